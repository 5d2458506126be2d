// The pictures of a run, a multirun or of all: what is shown, the filters above it, and what is selected.

import { get, runs, star } from "./api.js";
import { button, copy, fill, h, icon, select, toast } from "./dom.js";
import { count, jobsOf, nameOf, runName } from "./format.js";
import { VirtualGrid } from "./grid.js";
import { facts, pill, progress } from "./runs.js";

const SORTS = [["newest", "Newest first"], ["oldest", "Oldest first"], ["prompt", "By prompt"], ["seed", "By seed"], ["slowest", "Slowest first"], ["largest", "Largest file"]];
const STATUS = [["", "Any state"], ["done", "Done"], ["failed", "Failed"]];
const STAR = [["", "Any mark"], ["starred", "Starred"], ["rejected", "Rejected"], ["unmarked", "Not marked"], ["kept", "Not rejected"]];
const TILES = [120, 160, 200, 260, 340, 460];
const SOONEST = 900; // milliseconds between two looks while pictures arrive

export class Gallery {
  constructor(main, scope, base, { go }) {
    Object.assign(this, { main, scope, base, go, fresh: true, query: {}, busy: false, late: false });
    this.head = h("section", { className: "run-head" });
    this.filters = h("div", { className: "filters", role: "search" });
    this.news = button("up", "Show the new pictures", () => this.#toTop(), "New pictures", { className: "button news", hidden: true });
    this.empty = h("div", { className: "empty", hidden: true });
    this.problem = h("p", { className: "problem", role: "alert", hidden: true });
    this.bar = h("div", { className: "selection", hidden: true, role: "region", "aria-label": "Selected pictures" });
    this.grid = new VirtualGrid(main, () => this.question(), {
      open: (picture) => go(`${base}/p/${picture.id}${this.suffix()}`),
      href: (picture) => `${base}/p/${picture.id}`,
      star: (pictures, value) => this.mark(pictures, value),
      select: (picture) => this.select(picture),
      failed: (error) => this.#tell(error),
    });
    const stored = Number(localStorage.getItem("tile")) || (main.clientWidth < 500 ? 160 : 200);
    this.grid.tile = TILES.includes(stored) ? stored : 200;
    this.element = h("div", { className: "gallery" }, this.head, this.filters, this.problem, this.grid.element, this.empty, this.news, this.bar);
    main.append(this.element);
    this.#makeFilters();
    this.listener = (event) => this.#changed(event.detail);
    runs.addEventListener("change", this.listener);
    this.#drawHead();
    this.#facets();
  }

  destroy() {
    runs.removeEventListener("change", this.listener);
    this.grid.destroy();
  }

  question() { return { scope: this.scope, ...this.query }; }

  /** The filters as the end of an address. */
  suffix() {
    const query = new URLSearchParams(Object.entries(this.query).filter(([name, value]) => value && !(name === "sort" && value === "newest")));
    const text = query.toString();
    return text ? `?${text}` : "";
  }

  setQuery(parameters) {
    const query = { q: "", status: "", star: "", sort: "newest", ...Object.fromEntries(parameters) };
    if (!this.fresh && JSON.stringify(query) === JSON.stringify(this.query)) return;
    this.fresh = false;
    this.query = query;
    if (this.search.value.trim() !== query.q) this.search.value = query.q;
    for (const name of ["status", "star", "sort"]) this[name].value = query[name];
    this.reload();
  }

  #ask(changes) {
    this.query = { ...this.query, ...changes };
    const address = this.base + this.suffix();
    history.replaceState(null, "", address);
    this.reload();
  }

  async reload(options = {}) {
    try {
      const answer = await this.grid.reload(options);
      if (!answer) return;
      this.problem.hidden = true;
      this.total.textContent = `${count(answer.total)} picture${answer.total === 1 ? "" : "s"}`;
      this.empty.hidden = answer.total > 0;
      if (!answer.total) this.#drawEmpty();
      this.took = answer.took;
      if (!options.keep) this.news.hidden = true;
    } catch (error) { this.#tell(error); }
  }

  #tell(error) {
    this.problem.textContent = error.message;
    this.problem.hidden = false;
  }

  #drawEmpty() {
    const asked = this.query.q || this.query.status || this.query.star;
    if (asked) {
      fill(this.empty, icon("search"), h("h2", {}, "No picture fits"), h("p", {}, "Take a condition away to see more."),
        button("", "Clear the filters", () => this.go(this.base), "Clear the filters"));
    } else {
      fill(this.empty, icon("picture"), h("h2", {}, "No pictures yet"), h("p", {}, "They appear here as they are drawn."));
    }
  }

  #makeFilters() {
    let waiting = 0;
    this.search = h("input", {
      type: "search", placeholder: "Search prompts, or seed=1-9, steps>4", "aria-label": "Search prompts", spellcheck: false,
      oninput: () => { clearTimeout(waiting); waiting = setTimeout(() => this.#ask({ q: this.search.value.trim() }), 180); },
      onkeydown: (event) => {
        if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); this.grid.focus(this.grid.focused); }
        if (event.key === "Escape") { if (!this.search.value) this.grid.focus(this.grid.focused); }
      },
    });
    this.status = select("State", STATUS, "", (value) => this.#ask({ status: value }));
    this.star = select("Mark", STAR, "", (value) => this.#ask({ star: value }));
    this.sort = select("Order", SORTS, "newest", (value) => this.#ask({ sort: value }));
    this.parameters = h("details", { className: "menu", hidden: true });
    this.total = h("span", { className: "total", role: "status" });
    fill(this.filters, h("label", { className: "search" }, icon("search"), this.search),
      h("div", { className: "choices" }, this.status, this.star, this.parameters, this.sort),
      h("div", { className: "sizes" }, this.total,
        button("", "Smaller tiles (−)", () => this.#resize(-1), "−", { className: "button bare", "aria-label": "Smaller tiles" }),
        button("", "Larger tiles (+)", () => this.#resize(1), "+", { className: "button bare", "aria-label": "Larger tiles" })));
  }

  #resize(step) {
    const place = TILES.indexOf(this.grid.tile) + step;
    if (place < 0 || place >= TILES.length) return;
    localStorage.setItem("tile", TILES[place]);
    this.grid.setTile(TILES[place]);
  }

  /** Menus for what differs between these pictures. */
  async #facets() {
    let found;
    try { found = await get("/api/facets", { scope: this.scope }); } catch { return; }
    const fields = Object.entries(found.parameters).filter(([name]) => !["width", "height"].includes(name));
    if (found.sizes.length > 1) fields.unshift(["size", found.sizes]);
    this.fields = fields.map(([name]) => name);
    this.parameters.hidden = !fields.length;
    const open = this.parameters.open;
    fill(this.parameters, h("summary", { className: "button" }, "Parameters", icon("down")),
      h("div", { className: "menu-body" }, fields.slice(0, 30).map(([name, values]) => h("label", {},
        h("span", {}, name), select(name, [["", "any"], ...values.map((value) => [String(value), String(value) || "(empty)"])],
          this.#condition(name), (value) => this.#setCondition(name, value))))));
    this.parameters.open = open;
    this.#drawHead();
  }

  #condition(name) {
    const match = new RegExp(`(?:^|\\s)${name.replaceAll(".", "\\.")}=(?:"([^"]*)"|(\\S+))`).exec(this.search.value);
    return match ? match[1] ?? match[2] : "";
  }

  #setCondition(name, value) {
    const pattern = new RegExp(`(^|\\s)${name.replaceAll(".", "\\.")}=(?:"[^"]*"|\\S+)`);
    const rest = this.search.value.replace(pattern, " ").trim();
    const word = value === "" ? "" : `${name}=${/\s/.test(value) ? `"${value}"` : value}`;
    this.search.value = [rest, word].filter(Boolean).join(" ");
    this.#ask({ q: this.search.value });
  }

  #changed(event) {
    const inside = runs.inScope(this.scope);
    if (event.type === "run" && inside && !inside.has(event.run.id)) return;
    this.#drawHead();
    if (event.type === "run" && event.version !== this.seen) {
      this.seen = event.version;
      this.#later();
    } else if (event.type === "all" || event.type === "indexing" || event.type === "gone") this.#later();
  }

  /** Look again, but never more often than the server answers easily. */
  #later() {
    if (this.fresh || this.waiting) { this.late = true; return; }
    const pause = Math.max(SOONEST, 20_000 * (this.took || 0));
    this.waiting = setTimeout(async () => {
      this.waiting = null;
      const away = this.query.sort === "newest" && this.main.scrollTop > this.grid.element.offsetTop + 200;
      if (away) {
        // What is being looked at stays where it is: only the number of pictures is asked for.
        try {
          const answer = await get("/api/pictures", { ...this.question(), limit: 0 });
          this.total.textContent = `${count(answer.total)} pictures`;
          const more = answer.total - this.grid.total;
          this.news.hidden = more <= 0;
          this.news.querySelector("span").textContent = `${count(more)} new`;
        } catch { /* asked again at the next change */ }
      } else await this.reload({ keep: true });
      this.#facetsSometimes();
      if (this.late) { this.late = false; this.#later(); }
    }, pause);
  }

  #facetsSometimes() {
    const now = Date.now();
    if (now - (this.facetsAt || 0) < 10_000) return;
    this.facetsAt = now;
    this.#facets();
  }

  #toTop() {
    this.news.hidden = true;
    this.main.scrollTop = 0;
    this.reload();
  }

  #drawHead() {
    const isSweep = this.scope.startsWith("sweep:");
    const run = isSweep ? runs.sweeps.get(this.scope.slice(6)) : runs.runs.get(Number(this.scope.slice(4)));
    if (this.scope === "all") {
      this.#fillHead(JSON.stringify(this.fields), h("div", { className: "run-title" }, h("h1", {}, "All pictures")));
      return;
    }
    if (!run) {
      const words = runs.ready ? "This run is gone" : "Reading ...";
      this.#fillHead(words, h("div", { className: "run-title" }, h("h1", {}, words)));
      return;
    }
    const { title, detail } = isSweep ? nameOf(run.path) : runName(run);
    const jobs = isSweep ? run.jobs.map((id) => runs.runs.get(id)).filter(Boolean) : [];
    const useful = isSweep || (this.fields?.length ?? 0) > 0 || run.done > 1;
    this.#fillHead(JSON.stringify([run, jobs, useful]),
      h("div", { className: "run-title" }, h("h1", {}, title), pill(run), h("span", { className: "detail" }, detail), h("span", { className: "grow" }),
        useful ? h("a", { className: "button", href: `${this.base}/grid` }, icon("grid"), h("span", {}, "Grid")) : null),
      run.state === "running" || run.state === "interrupted" ? progress(run) : null,
      h("dl", { className: "facts" }, facts(run).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      run.stopped && run.state !== "running" ? h("p", { className: "reason" }, `stopped: ${run.stopped}`) : null,
      isSweep ? this.#jobs(run, jobs) : null);
  }

  #fillHead(key, ...children) {
    if (this.headKey === key) return;
    this.headKey = key;
    const open = this.head.querySelector("details")?.open;
    const focus = this.head.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    fill(this.head, ...children);
    if (open) this.head.querySelector("details").open = true;
    if (focus) [...this.head.querySelectorAll("a")].find((link) => link.getAttribute("href") === focus)?.focus({ preventScroll: true });
  }

  #jobs(sweep, jobs) {
    const cell = (text) => h("td", {}, text);
    return h("details", { className: "jobs" }, h("summary", {}, jobsOf(sweep), icon("down")),
      h("div", { className: "scroll-x", tabIndex: 0, role: "region", "aria-label": "Jobs" }, h("table", {},
        h("thead", {}, h("tr", {}, ["job", ...sweep.varying.map((name) => name.replace(/^sampling\./, "")), "state", "done", "failed"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, jobs.map((job) => h("tr", {},
          h("td", {}, h("a", { href: `#/run/${job.id}` }, job.job ?? job.path)),
          sweep.varying.map((name) => cell(String(job.parameters[name] ?? ""))),
          h("td", {}, pill(job)), cell(`${count(job.done)}${job.planned ? ` / ${count(job.planned)}` : ""}`), cell(job.failed ? count(job.failed) : "")))))));
  }

  async mark(pictures, value) {
    const ids = pictures.map((picture) => picture.id);
    try {
      await star(ids, value);
    } catch (error) {
      toast(error.message);
      return false;
    }
    for (const picture of pictures) picture.star = value;
    this.grid.mark(ids, value);
    return true;
  }

  select(picture) {
    const { selected } = this.grid;
    if (!selected.delete(picture.id)) selected.set(picture.id, picture);
    this.grid.redraw();
    this.#drawBar();
  }

  #drawBar() {
    const chosen = [...this.grid.selected.values()];
    this.bar.hidden = !chosen.length;
    this.element.classList.toggle("selecting", chosen.length > 0);
    if (!chosen.length) return;
    const fits = chosen.length >= 2 && chosen.length <= 4;
    const compare = button("compare", fits ? "Compare side by side" : "Select two to four pictures to compare",
      () => this.go(`#/compare/${chosen.map((picture) => picture.id).join(",")}`), "Compare", { className: "button strong", disabled: !fits });
    fill(this.bar, h("span", { role: "status" }, `${chosen.length} selected`), compare,
      button("star", "Star the selected", () => this.mark(chosen, 1), "Star"),
      button("reject", "Reject the selected", () => this.mark(chosen, -1), "Reject"),
      button("copy", "Copy the paths of the selected", () => this.#copyPaths(chosen), "Paths"),
      button("close", "Clear the selection", () => { this.grid.selected.clear(); this.grid.redraw(); this.#drawBar(); this.grid.focus(this.grid.focused, { show: false }); }));
  }

  async #copyPaths(chosen) {
    const details = await Promise.all(chosen.slice(0, 200).map((picture) => get(`/api/picture/${picture.id}`)));
    await copy(details.map((picture) => picture.path).join("\n"), `${details.length} paths`);
  }

  press(event) {
    if (event.key === "+" || event.key === "=") this.#resize(1);
    else if (event.key === "-") this.#resize(-1);
    else if (event.key === "Escape" && this.grid.selected.size) { this.grid.selected.clear(); this.grid.redraw(); this.#drawBar(); }
    else if (this.grid.element.contains(document.activeElement) || !this.grid.total) return false;
    else if (event.key.startsWith("Arrow")) this.grid.focus(this.grid.focused);
    else if (event.key === "Home") this.grid.focus(0);
    else if (event.key === "End") this.grid.focus(this.grid.total - 1);
    else return false;
    return true;
  }

  /** The picture that lay above was closed: its tile has the focus now. */
  returned(id) {
    const position = id ? this.grid.positionOf(id) : null;
    if (this.grid.total) this.grid.focus(position ?? this.grid.focused);
  }
}
