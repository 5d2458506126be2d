// A grid of any number of pictures, of which only those in sight exist as elements.

import { get, thumb } from "./api.js";
import { button, h, icon } from "./dom.js";

const PAGE = 100;
const KEPT_PAGES = 60;
const CAPTION = 32;
const GAP = 12;
const TALLEST = 8_000_000; // browsers cut off elements of more than about 16 million pixels

export class VirtualGrid {
  /** `ask()`: parameters of the question; `actions`: open(picture, position), star(pictures, value), select(picture). */
  constructor(scroller, ask, actions) {
    this.scroller = scroller;
    this.ask = ask;
    this.actions = actions;
    this.total = 0;
    this.version = null;
    this.tile = 200;
    this.focused = 0;
    this.selected = new Map();
    this.pages = new Map();
    this.tiles = new Map();
    this.generation = 0;
    this.virtualTop = 0;
    this.lastTop = 0;
    this.list = h("ul", { className: "tiles", "aria-label": "Pictures", role: "list" });
    this.element = h("div", { className: "grid", onkeydown: (event) => this.#key(event) }, this.list);
    this.onscroll = () => { this.#scrolled(); this.#render(); };
    scroller.addEventListener("scroll", this.onscroll, { passive: true });
    this.observer = new ResizeObserver(() => {
      if (this.element.clientWidth !== this.width) this.#layout();
    });
    this.observer.observe(this.element);
  }

  destroy() {
    this.scroller.removeEventListener("scroll", this.onscroll);
    this.observer.disconnect();
  }

  /** Ask anew. `keep`: stay where we are, as when pictures were added. */
  async reload({ keep = false } = {}) {
    const generation = ++this.generation;
    const first = keep ? Math.floor(Math.max(0, this.#firstRow() - 2) * this.columns / PAGE) : 0;
    const last = keep ? Math.floor(this.#lastPosition() / PAGE) : 0;
    const pages = new Map();
    let answer = null;
    for (let page = first; page <= last; page++) {
      answer = await get("/api/pictures", { ...this.ask(), offset: page * PAGE, limit: PAGE, version: answer?.version });
      if (generation !== this.generation) return null;
      pages.set(page, answer.pictures);
    }
    this.version = answer.version;
    this.total = answer.total;
    this.pages = pages;
    if (!keep) {
      this.scroller.scrollTop = 0;
      this.virtualTop = this.lastTop = 0;
      this.focused = 0;
      this.#layout();
    } else this.#swap();
    return answer;
  }

  /** New pictures have come: what is in sight moves to its new place and stays the same element. */
  #swap() {
    const known = new Map([...this.tiles.values()].filter((tile) => tile.picture).map((tile) => [tile.picture.id, tile]));
    const inFocus = this.tiles.get(this.focused)?.picture?.id;
    this.tiles.clear();
    for (const [page, pictures] of this.pages) {
      pictures.forEach((picture, place) => {
        const tile = known.get(picture.id);
        if (!tile) return;
        known.delete(picture.id);
        tile.position = page * PAGE + place;
        tile.element.setAttribute("aria-posinset", tile.position + 1);
        this.tiles.set(tile.position, tile);
        if (picture.id === inFocus) this.focused = tile.position;
      });
    }
    for (const tile of this.list.querySelectorAll(".tile")) {
      if (![...this.tiles.values()].some((kept) => kept.element === tile)) tile.remove();
    }
    this.focused = Math.min(this.focused, Math.max(0, this.total - 1));
    this.#layout(true);
    for (const [position, tile] of this.tiles) this.#draw(position, tile);
  }

  setTile(size) {
    const first = this.#firstRow() * this.columns;
    this.tile = size;
    this.#layout();
    this.#showRow(Math.floor(first / this.columns), true);
  }

  /** The picture at a place of the list, from the server if need be. */
  async at(position) {
    if (position < 0 || position >= this.total) return null;
    const page = Math.floor(position / PAGE);
    if (!this.pages.get(page)?.length) await this.#load(page);
    return this.pages.get(page)?.[position % PAGE] ?? null;
  }

  /** Where a picture stands, if it was seen lately. */
  positionOf(id) {
    for (const [page, pictures] of this.pages) {
      const place = pictures.findIndex((picture) => picture.id === id);
      if (place >= 0) return page * PAGE + place;
    }
    return null;
  }

  /** A picture was starred or rejected: show it. */
  mark(ids, value) {
    for (const pictures of this.pages.values()) {
      for (const picture of pictures) if (ids.includes(picture.id)) picture.star = value;
    }
    for (const [position, tile] of this.tiles) {
      if (ids.includes(tile.picture?.id)) this.#draw(position, tile);
    }
  }

  redraw() { for (const [position, tile] of this.tiles) this.#draw(position, tile); }

  focus(position, { show = true } = {}) {
    const before = this.focused;
    this.focused = Math.max(0, Math.min(position, this.total - 1));
    if (show) this.#showRow(Math.floor(this.focused / this.columns));
    this.#render();
    for (const place of [before, this.focused]) if (this.tiles.has(place)) this.#draw(place, this.tiles.get(place));
    this.tiles.get(this.focused)?.link.focus({ preventScroll: true });
  }

  get columns() { return this._columns || 1; }
  get rows() { return Math.ceil(this.total / this.columns); }

  #layout(keep = false) {
    const width = this.element.clientWidth;
    if (!width) return;
    this.width = width;
    this._columns = Math.max(1, Math.floor((width + GAP) / (this.tile + GAP)));
    this.side = Math.floor((width - GAP * (this._columns - 1)) / this._columns);
    this.rowHeight = this.side + CAPTION + GAP;
    this.fullHeight = this.rows * this.rowHeight;
    this.height = Math.min(this.fullHeight, TALLEST);
    this.list.style.height = `${this.height}px`;
    this.element.style.setProperty("--side", `${this.side}px`);
    if (!keep) {
      for (const tile of this.tiles.values()) tile.element.remove();
      this.tiles.clear();
    }
    this.#scrolled(!keep);
    this.#render();
  }

  /** Pixels of the list above the scroller's upper edge. */
  #scrollTop() {
    return Math.max(0, this.scroller.scrollTop - this.element.offsetTop);
  }

  /** Where that is in the list as tall as it would be. Small steps are taken as they are, large ones in proportion. */
  #scrolled(anew = false) {
    const top = this.#scrollTop();
    if (this.fullHeight <= TALLEST) this.virtualTop = top;
    else {
      const view = this.scroller.clientHeight;
      const end = this.height - view, fullEnd = this.fullHeight - view;
      const step = top - this.lastTop;
      if (anew || Math.abs(step) > 2 * view || top <= 0 || top >= end - 1) this.virtualTop = (top / end) * fullEnd;
      else this.virtualTop += step;
      this.virtualTop = Math.max(0, Math.min(this.virtualTop, fullEnd));
    }
    this.lastTop = top;
  }

  #firstRow() { return this.rowHeight ? Math.floor(this.virtualTop / this.rowHeight) : 0; }

  #lastPosition() {
    const rows = Math.ceil(this.scroller.clientHeight / (this.rowHeight || 1)) + 3;
    return Math.max(0, Math.min(this.total - 1, (this.#firstRow() + rows) * this.columns));
  }

  #showRow(row, atTop = false) {
    const top = row * this.rowHeight, view = this.scroller.clientHeight;
    const head = this.scroller.querySelector(".filters")?.offsetHeight || 0;
    let wanted = this.virtualTop;
    if (atTop || top < this.virtualTop + head) wanted = top - head;
    else if (top + this.rowHeight > this.virtualTop + view) wanted = top + this.rowHeight - view;
    else return;
    wanted = Math.max(0, wanted);
    if (this.fullHeight <= TALLEST) this.scroller.scrollTop = wanted + this.element.offsetTop;
    else {
      const end = this.height - view, fullEnd = this.fullHeight - view;
      this.scroller.scrollTop = (wanted / fullEnd) * end + this.element.offsetTop;
      this.lastTop = this.#scrollTop();
      this.virtualTop = wanted;
    }
    this.#scrolled();
  }

  #render() {
    if (!this.rowHeight) return;
    const view = this.scroller.clientHeight;
    const from = Math.max(0, this.#firstRow() - 2) * this.columns;
    const to = Math.min(this.total, (Math.ceil((this.virtualTop + view) / this.rowHeight) + 2) * this.columns);
    for (const [position, tile] of this.tiles) {
      if (position < from || position >= to) { tile.element.remove(); this.tiles.delete(position); }
    }
    const shift = this.#scrollTop() - this.virtualTop;
    for (let position = from; position < to; position++) {
      let tile = this.tiles.get(position);
      if (!tile) {
        tile = this.#make(position);
        this.tiles.set(position, tile);
        this.#insert(position, tile.element);
      }
      const row = Math.floor(position / this.columns), column = position % this.columns;
      tile.element.style.transform = `translate(${column * (this.side + GAP)}px, ${row * this.rowHeight + shift}px)`;
    }
    for (let page = Math.floor(from / PAGE); page <= Math.floor(Math.max(from, to - 1) / PAGE); page++) {
      if (this.total && !this.pages.has(page)) this.#loadSoon(page);
    }
  }

  /** Keep the elements in the list's order: that is the order in which they are read out and tabbed through. */
  #insert(position, element) {
    let next = null;
    for (let place = position + 1; place < position + 400 && !next; place++) next = this.tiles.get(place)?.element ?? null;
    this.list.insertBefore(element, next && next.parentNode === this.list ? next : null);
  }

  #loadSoon(page) {
    if (this.waiting?.has(page)) return;
    (this.waiting ??= new Set()).add(page);
    // A page that is scrolled past at once is not asked for.
    setTimeout(() => {
      this.waiting.delete(page);
      const first = this.#firstRow() * this.columns;
      const last = first + (Math.ceil(this.scroller.clientHeight / this.rowHeight) + 3) * this.columns;
      if (page * PAGE <= last && (page + 1) * PAGE >= first - 2 * this.columns) this.#load(page);
    }, 40);
  }

  async #load(page) {
    if (this.pages.has(page)) return this.pages.get(page);
    const generation = this.generation;
    const loading = get("/api/pictures", { ...this.ask(), offset: page * PAGE, limit: PAGE, version: this.version });
    try {
      const answer = await loading;
      if (generation !== this.generation) return null;
      this.pages.set(page, answer.pictures);
      if (this.pages.size > KEPT_PAGES) {
        const here = this.#firstRow() * this.columns / PAGE;
        const farthest = [...this.pages.keys()].sort((a, b) => Math.abs(b - here) - Math.abs(a - here))[0];
        this.pages.delete(farthest);
      }
      for (const [position, tile] of this.tiles) if (Math.floor(position / PAGE) === page) this.#draw(position, tile);
    } catch (error) {
      this.actions.failed(error);
    }
    return this.pages.get(page);
  }

  #make(position) {
    const link = h("a", { className: "tile-link", draggable: false });
    const tile = { position, link, element: h("li", { className: "tile", "aria-posinset": position + 1, "aria-setsize": this.total }, link) };
    link.addEventListener("click", (event) => {
      if (!tile.picture || event.metaKey || event.ctrlKey) return;
      event.preventDefault();
      this.focused = tile.position;
      this.actions.open(tile.picture, tile.position);
    });
    link.addEventListener("focus", () => {
      if (this.focused === tile.position) return;
      const before = this.tiles.get(this.focused);
      this.focused = tile.position;
      if (before) before.link.tabIndex = -1;
      link.tabIndex = 0;
    });
    this.#draw(position, tile);
    return tile;
  }

  #draw(position, tile) {
    const picture = this.pages.get(Math.floor(position / PAGE))?.[position % PAGE];
    const { link, element } = tile;
    link.tabIndex = position === this.focused ? 0 : -1;
    if (!picture) {
      link.replaceChildren(h("span", { className: "frame waiting" }), h("span", { className: "caption" }, h("span", { className: "hidden-text" }, "loading")));
      link.removeAttribute("href");
      return;
    }
    const chosen = this.selected.has(picture.id);
    const key = `${picture.id} ${picture.v} ${picture.star} ${chosen} ${picture.status}`;
    if (tile.key === key) return;
    tile.key = key;
    tile.picture = picture;
    element.className = `tile${picture.star > 0 ? " starred" : picture.star < 0 ? " rejected" : ""}${chosen ? " chosen" : ""}`;
    link.href = this.actions.href(picture);
    const marks = `${picture.star > 0 ? ", starred" : picture.star < 0 ? ", rejected" : ""}${picture.status === "failed" ? ", failed" : ""}`;
    const old = link.querySelector("img");
    const frame = h("span", { className: "frame" }, this.#content(picture, old));
    link.replaceChildren(frame, h("span", { className: "caption" },
      h("span", { className: "prompt", dir: "auto" }, picture.prompt), " ",
      h("span", { className: "seed" }, `seed ${picture.seed}`), h("span", { className: "hidden-text" }, marks)));
    for (const other of element.querySelectorAll("button")) other.remove();
    element.append(
      button("check", chosen ? "Take out of the selection (c)" : "Select (c)", () => this.actions.select(picture), "",
        { className: "button bare mark choose", tabIndex: -1, "aria-pressed": String(chosen) }),
      button("star", picture.star > 0 ? "Remove the star (s)" : "Star (s)", () => this.actions.star([picture], picture.star > 0 ? 0 : 1), "",
        { className: "button bare mark star", tabIndex: -1, "aria-pressed": String(picture.star > 0) }),
    );
  }

  #content(picture, old) {
    if (picture.status === "failed") {
      return h("span", { className: "failed" }, icon("warn"), h("span", {}, picture.error || "failed"));
    }
    const address = thumb(picture, this.side * devicePixelRatio > 330 ? 640 : this.side * devicePixelRatio > 170 ? 320 : 160);
    if (old?.getAttribute("src") === address) return old;
    const image = h("img", { alt: "", decoding: "async", draggable: false, src: address });
    image.addEventListener("error", () => {
      image.replaceWith(h("span", { className: "failed" }, icon("warn"), h("span", {}, "the file is missing or damaged")));
    });
    return image;
  }

  #key(event) {
    if (event.altKey || event.metaKey || event.ctrlKey || event.target.closest("input, select, textarea")) return;
    const screen = Math.max(1, Math.floor(this.scroller.clientHeight / this.rowHeight)) * this.columns;
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -screen, PageDown: screen,
      Home: -this.total, End: this.total,
    };
    const tile = this.tiles.get(this.focused);
    if (event.key in steps) {
      const next = this.focused + steps[event.key];
      if (event.key.startsWith("Arrow") && (next < 0 || next >= this.total)) return;
      this.focus(next);
    } else if (!tile?.picture) return;
    else if (event.key === "s") this.actions.star([tile.picture], tile.picture.star > 0 ? 0 : 1);
    else if (event.key === "x") this.actions.star([tile.picture], tile.picture.star < 0 ? 0 : -1);
    else if (event.key === "c") this.actions.select(tile.picture);
    else return;
    event.preventDefault();
  }
}
