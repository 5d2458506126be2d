// The first view: every run and multirun, the running ones first.

import { runs, thumb } from "./api.js";
import { button, fill, h, icon } from "./dom.js";
import { count, duration, gb, jobsOf, nameOf, runName, speed, STATES } from "./format.js";

const SHOWN = 60;

export function pill(run) {
  const text = run.loading ? "getting ready" : STATES[run.state];
  return h("span", { className: `pill ${run.state}` }, h("span", { className: "dot", "aria-hidden": "true" }), text);
}

export function progress(run) {
  const settled = run.done + run.failed;
  const share = run.planned ? Math.min(1, settled / run.planned) : 0;
  const bar = h("div", {
    className: `progress ${run.state}`, role: "progressbar", "aria-label": "Pictures drawn", "aria-valuemin": 0,
    "aria-valuemax": run.planned || 0, "aria-valuenow": settled,
  }, h("span", {}));
  bar.firstChild.style.width = `${share * 100}%`;
  return bar;
}

/** [label, value] pairs of what is known of a run. */
export function facts(run) {
  const of = run.planned && run.planned !== run.done + run.failed ? ` of ${count(run.planned)}` : "";
  const memory = Object.entries(run.memory || {}).map(([kind, value]) => `${gb(value)} ${kind === "gpu" ? "GPU" : kind}`).join(", ");
  return [
    ["pictures", `${count(run.done)}${of}`],
    run.failed ? ["failed", count(run.failed)] : null,
    run.starred ? ["starred", count(run.starred)] : null,
    run.speed ? ["speed", speed(run.speed)] : null,
    run.left_seconds ? ["left", duration(run.left_seconds)] : null,
    run.seconds ? ["took", duration(run.seconds)] : null,
    memory ? ["memory", memory] : null,
  ].filter(Boolean);
}

export class Home {
  constructor(main) {
    this.shown = SHOWN;
    this.filter = "";
    this.cards = new Map();
    this.search = h("input", {
      type: "search", placeholder: "Find a run", "aria-label": "Find a run", spellcheck: false,
      oninput: () => { this.filter = this.search.value.toLowerCase(); this.draw(); },
    });
    this.status = h("p", { className: "status", role: "status" });
    this.list = h("div", { className: "cards" });
    this.more = button("down", "Show more runs", () => { this.shown += SHOWN; this.draw(); }, "Show more");
    this.empty = h("div", { className: "empty" });
    this.element = h("div", { className: "home" },
      h("div", { className: "home-head" }, h("h1", {}, "Runs"), this.status, h("label", { className: "search" }, icon("search"), this.search)),
      this.list, this.empty, this.more);
    main.append(this.element);
    this.listener = () => this.draw();
    runs.addEventListener("change", this.listener);
    this.draw();
  }

  destroy() { runs.removeEventListener("change", this.listener); }

  #entries() {
    const single = [...runs.runs.values()].filter((run) => run.sweep === null);
    return [...single, ...runs.sweeps.values()]
      .filter((run) => !this.filter || run.path.toLowerCase().includes(this.filter))
      .sort((a, b) => (b.state === "running") - (a.state === "running") || b.changed - a.changed);
  }

  draw() {
    const entries = this.#entries();
    const pictures = [...runs.runs.values()].reduce((sum, run) => sum + run.done, 0);
    const total = [...runs.runs.values()].filter((run) => run.sweep === null).length + runs.sweeps.size;
    this.status.textContent = total ? `${count(total)} run${total === 1 ? "" : "s"}, ${count(pictures)} pictures${runs.ready ? "" : ", still reading"}` : "";
    const wanted = entries.slice(0, this.shown);
    const keys = new Set(wanted.map((entry) => entry.path));
    for (const [path, card] of this.cards) if (!keys.has(path)) { card.element.remove(); this.cards.delete(path); }
    let before = null;
    for (const entry of wanted) {
      let card = this.cards.get(entry.path);
      if (!card) { card = { element: h("article", { className: "card" }) }; this.cards.set(entry.path, card); }
      const text = JSON.stringify(entry);
      if (card.text !== text) { card.text = text; drawCard(card.element, entry); }
      const next = before ? before.nextSibling : this.list.firstChild;
      if (next !== card.element) this.list.insertBefore(card.element, next);
      before = card.element;
    }
    this.more.hidden = entries.length <= this.shown;
    this.empty.hidden = entries.length > 0;
    if (!entries.length) fill(this.empty, emptyText(total));
  }
}

function emptyText(total) {
  if (total) return [icon("search"), h("h2", {}, "No run is called that"), h("p", {}, "Search for a part of its folder's name.")];
  if (!runs.root) return [h("p", {}, "Looking for runs ...")];
  return [
    icon("picture"), h("h2", {}, "No runs here yet"),
    h("p", {}, "Runs below ", h("code", {}, runs.root), " appear here as soon as they begin. Start one with"),
    h("pre", {}, "python -m zimage_runner +experiment=quickstart"),
  ];
}

function drawCard(card, run) {
  const isSweep = Array.isArray(run.jobs);
  const address = isSweep ? `#/sweep/${encodeURIComponent(run.path)}` : `#/run/${run.id}`;
  const { title, detail } = isSweep ? nameOf(run.path) : runName(run);
  const hadFocus = card.contains(document.activeElement);
  const pictures = run.latest.slice(0, 4).map((picture) => h("img", { src: thumb(picture, 160), alt: "", loading: "lazy" }));
  while (pictures.length < 4) pictures.push(h("span", {}));
  const link = h("a", { href: address }, title);
  fill(card,
    h("div", { className: "mosaic", "aria-hidden": "true" }, pictures),
    h("div", { className: "card-body" },
      h("div", { className: "card-head" }, h("h2", { title: run.path }, link), pill(run)),
      h("p", { className: "detail" }, detail, isSweep ? h("span", { className: "tag" }, `multirun, ${jobsOf(run)}`) : null),
      run.state === "running" || run.state === "interrupted" ? progress(run) : null,
      h("dl", { className: "facts" }, facts(run).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      run.stopped && run.state !== "running" ? h("p", { className: "reason" }, `stopped: ${run.stopped}`) : null));
  if (hadFocus) link.focus({ preventScroll: true });
}
