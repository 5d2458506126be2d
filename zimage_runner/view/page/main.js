// Where we are is in the address after the #; each address has its view.

import { runs } from "./api.js";
import { comparison } from "./compare.js";
import { button, fill, h, icon } from "./dom.js";
import { runName } from "./format.js";
import { Gallery } from "./gallery.js";
import { PictureView } from "./picture.js";
import { Home } from "./runs.js";
import { SweepGrid } from "./sweep.js";

const main = document.getElementById("main");
const overlay = document.getElementById("overlay");
const crumbs = h("nav", { className: "crumbs", "aria-label": "Where you are" });
const dot = h("span", { className: "connection", role: "img" });
let below = null; // the view in the page
let above = null; // what lies over it
let returnFocus = null;

/** #/run/3/p/17?q=cat -> {parts: ["run", "3", "p", "17"], query} */
function here() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(query) };
}

function scopeOf(parts) {
  if (parts[0] === "run") return { scope: `run:${parts[1]}`, base: `#/run/${parts[1]}`, rest: parts.slice(2) };
  if (parts[0] === "sweep") return { scope: `sweep:${parts[1]}`, base: `#/sweep/${encodeURIComponent(parts[1])}`, rest: parts.slice(2) };
  return { scope: "all", base: "#/all", rest: parts.slice(1) };
}

function show() {
  const { parts, query } = here();
  if (parts.length === 0) {
    layOver(null);
    place("home", () => new Home(main));
    name([]);
    return;
  }
  if (parts[0] === "compare") {
    const ids = (parts[1] || "").split(",").map(Number).filter(Boolean).slice(0, 4);
    layOver(comparison(ids, query, { back: () => history.length > 1 ? history.back() : go("#/") }));
    if (!below) place("home", () => new Home(main));
    return;
  }
  const { scope, base, rest } = scopeOf(parts);
  if (rest[0] === "grid") {
    layOver(null);
    place(`grid ${scope}`, () => new SweepGrid(main, scope, base, { open: (id) => go(`${base}/p/${id}`) }));
    below.update?.(query);
    name(trail(scope, base, "Grid"));
    return;
  }
  if (!(rest[0] === "p" && below?.scope === scope)) place(`gallery ${scope}`, () => new Gallery(main, scope, base, { go }));
  if (below.setQuery && !(rest[0] === "p")) below.setQuery(query);
  else if (below.setQuery && below.fresh) below.setQuery(query);
  name(trail(scope, base));
  if (rest[0] === "p") {
    const id = Number(rest[1]);
    if (above?.isPictures && above.gallery === below) above.show(id);
    else layOver(new PictureView(below, id, { go, base, close: () => go(base + below.suffix()) }));
  } else layOver(null);
}

function place(key, make) {
  if (below?.key === key) return;
  below?.destroy?.();
  fill(main);
  main.scrollTop = 0;
  below = make();
  below.key = key;
}

function layOver(view) {
  if (above === view) return;
  const had = above;
  above?.destroy?.();
  above = view;
  fill(overlay, view?.element);
  overlay.hidden = !view;
  main.inert = document.getElementById("top").inert = document.getElementById("skip").inert = Boolean(view);
  if (view) {
    if (!had) returnFocus = document.activeElement;
    view.begin?.();
  } else if (had) {
    if (below?.returned) below.returned(had.id);
    else if (returnFocus?.isConnected) returnFocus.focus();
  }
}

export function go(address) {
  if (location.hash === address) show();
  else location.hash = address;
}

function trail(scope, base, last = "") {
  let title = "All pictures";
  if (scope.startsWith("run:")) title = runName(runs.runs.get(Number(scope.slice(4))) || { path: "run", sweep: null }).title;
  if (scope.startsWith("sweep:")) title = runName({ path: scope.slice(6), sweep: null }).title;
  const run = scope.startsWith("run:") ? runs.runs.get(Number(scope.slice(4))) : null;
  const parts = [];
  if (run?.sweep) {
    parts.push([`#/sweep/${encodeURIComponent(run.sweep)}`, runName({ path: run.sweep, sweep: null }).title]);
    title = `job ${run.job}`;
  }
  parts.push([last ? base : null, title]);
  if (last) parts.push([null, last]);
  return parts;
}

function name(parts) {
  document.title = [...parts.map((part) => part[1]).reverse(), "zimage gallery"].join(" · ");
  fill(crumbs, parts.map(([address, text]) => [
    h("span", { className: "slash", "aria-hidden": "true" }, "/"),
    address ? h("a", { href: address }, text) : h("span", { className: "current", "aria-current": "page" }, text),
  ]));
}

const KEYS = [
  ["Arrows, Home, End", "move between pictures"], ["Enter", "open the picture"], ["s", "star, or remove the star"],
  ["x", "reject, or take it back"], ["c", "select, to compare or to mark several"], ["/", "search"],
  ["+ and −", "larger and smaller tiles; in a picture: zoom"], ["0", "fit the picture, or show its own pixels"],
  ["i", "what made the picture"], ["Esc", "close, go back"], ["?", "this list"],
];
const help = h("dialog", { className: "help", "aria-labelledby": "help-title" },
  h("h2", { id: "help-title" }, "Keys"),
  h("dl", {}, KEYS.map(([key, what]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)))),
  h("p", {}, "Search: words of the prompt, and conditions such as seed=1-9, size=512x512, steps>4, status=failed. \"Quotes\" keep words together."),
  button("close", "Close", () => help.close(), "Close"));

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const writing = event.target.closest?.("input, select, textarea, dialog");
  if (event.key === "?" && !writing) help.showModal();
  else if (above?.key?.(event)) event.preventDefault();
  else if (!above && event.key === "/" && !writing) {
    const search = main.querySelector("input[type=search]");
    if (search) { search.focus(); search.select(); event.preventDefault(); }
  } else if (!above && !writing && below?.press?.(event)) event.preventDefault();
});

fill(document.getElementById("top"),
  h("a", { className: "brand", href: "#/" }, h("img", { src: "/page/icon.svg", alt: "", width: 22, height: 22 }), h("span", {}, "zimage gallery")),
  crumbs, h("span", { className: "grow" }), dot,
  h("a", { className: "button bare", href: "#/all", title: "All pictures", "aria-label": "All pictures" }, icon("picture")),
  button("", "Keys (?)", () => help.showModal(), "?", { className: "button bare", "aria-label": "Keys" }));
document.body.append(help);

function connection() {
  dot.classList.toggle("lost", !runs.connected);
  dot.setAttribute("aria-label", runs.connected ? "Connected: changes appear by themselves" : "The gallery does not answer");
  dot.title = dot.getAttribute("aria-label");
}
runs.addEventListener("connection", connection);
runs.addEventListener("change", (event) => { if (event.detail.type === "all") { const { parts } = here(); if (parts[0] === "run" || parts[0] === "sweep") name(trail(scopeOf(parts).scope, scopeOf(parts).base, scopeOf(parts).rest[0] === "grid" ? "Grid" : "")); } });
connection();
runs.start();
addEventListener("hashchange", show);
document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
show();
