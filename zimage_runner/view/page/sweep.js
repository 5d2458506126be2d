// Pictures by two of their fields: columns and rows, and a third field as pages.

import { get, runs, thumb } from "./api.js";
import { button, fill, h, icon, select } from "./dom.js";
import { nameOf, runName } from "./format.js";

export class SweepGrid {
  constructor(main, scope, base, { open }) {
    Object.assign(this, { scope, base, open, page: 0, columns: "", rows: "", pages: "" });
    this.title = h("h1", {}, "Grid");
    this.choices = h("div", { className: "filters axes" });
    this.table = h("div", { className: "axes-table", tabIndex: 0, role: "region", "aria-label": "Grid of pictures" });
    main.append(h("div", { className: "sweep" }, h("section", { className: "run-head" }, h("div", { className: "run-title" }, this.title)), this.choices, this.table));
  }

  async update(query) {
    const path = this.scope.startsWith("sweep:") ? this.scope.slice(6) : null;
    const run = runs.runs.get(Number(this.scope.slice(4)));
    this.title.textContent = path !== null ? nameOf(path).title : run ? runName(run).title : "All pictures";
    try {
      const found = await get("/api/facets", { scope: this.scope });
      this.fields = ["prompt", "seed", ...Object.keys(found.parameters).filter((name) => name !== "model" || found.parameters.model.length > 1)];
      if (found.sizes.length > 1 && !this.fields.includes("width")) this.fields.push("width");
      if (this.scope === "all" || this.scope.startsWith("sweep:")) this.fields.push("run");
    } catch (error) {
      fill(this.table, h("p", { className: "problem", role: "alert" }, error.message));
      return;
    }
    const swept = this.fields.filter((name) => !["prompt", "seed", "run"].includes(name));
    const [columns, rows] = swept.length >= 2 ? [swept[0], swept[1]] : swept.length === 1 ? [swept[0], "prompt"] : ["seed", "prompt"];
    this.columns = query.get("columns") || columns;
    this.rows = query.get("rows") || rows;
    const rest = ["prompt", "seed", ...swept].filter((name) => name !== this.columns && name !== this.rows);
    this.pages = query.has("pages") ? query.get("pages") : swept.length ? rest[0] || "" : "";
    this.page = Number(query.get("page")) || 0;
    await this.#draw();
  }

  #question() { return { scope: this.scope, columns: this.columns, rows: this.rows, pages: this.pages, page: this.page }; }

  #set(changes) {
    const before = { columns: this.columns, rows: this.rows, pages: this.pages };
    Object.assign(this, { page: 0 }, changes);
    // A field that is chosen where another stands changes places with it.
    for (const [name, value] of Object.entries(changes)) {
      for (const other of ["columns", "rows", "pages"]) {
        if (name in before && other !== name && value && this[other] === value) this[other] = before[name];
      }
    }
    const query = new URLSearchParams({ columns: this.columns, rows: this.rows, pages: this.pages, page: this.page });
    history.replaceState(null, "", `${this.base}/grid?${query}`);
    this.#draw();
  }

  async #draw() {
    const question = this.#question();
    let grid;
    try {
      grid = await get("/api/grid", question);
    } catch (error) {
      fill(this.table, h("p", { className: "problem", role: "alert" }, error.message));
      return;
    }
    const options = this.fields.map((name) => [name, name.replaceAll("_", " ").replace("num inference ", "")]);
    const axis = (label, name, none = []) => h("label", {}, h("span", {}, label), select(label, [...none, ...options], this[name], (value) => this.#set({ [name]: value })));
    const pager = grid.pages.length > 1 ? h("div", { className: "pager" },
      button("back", "Previous page", () => this.#set({ page: this.page - 1 }), "", { disabled: grid.page === 0 }),
      select("Page", grid.pages.map((text, n) => [String(n), text || "(empty)"]), String(grid.page), (value) => this.#set({ page: Number(value) })),
      button("next", "Next page", () => this.#set({ page: this.page + 1 }), "", { disabled: grid.page >= grid.pages.length - 1 })) : null;
    fill(this.choices, axis("Columns", "columns"), axis("Rows", "rows"), axis("Pages", "pages", [["", "none"]]), pager, h("span", { className: "grow" }),
      h("a", { className: "button", href: `/api/grid.png?${new URLSearchParams(question)}`, download: "grid.png" }, icon("save"), h("span", {}, "Save as picture")));
    const cells = new Map(grid.cells.map((cell) => [`${cell.row} ${cell.column}`, cell]));
    if (!cells.size) {
      fill(this.table, h("div", { className: "empty" }, icon("grid"), h("h2", {}, "Nothing to lay out yet"), h("p", {}, "The grid shows finished pictures.")));
      return;
    }
    fill(this.table, grid.cut ? h("p", { className: "reason" }, "There are more columns or rows than can be shown: filter or choose other fields.") : null,
      h("table", {},
        h("thead", {}, h("tr", {}, h("td", {}), grid.columns.map((text) => h("th", { scope: "col", dir: "auto" }, text || "(empty)")))),
        h("tbody", {}, grid.rows.map((text, row) => h("tr", {}, h("th", { scope: "row", dir: "auto" }, text || "(empty)"),
          grid.columns.map((_, column) => h("td", {}, this.#cell(cells.get(`${row} ${column}`)))))))));
  }

  #cell(picture) {
    if (!picture) return h("span", { className: "hole", role: "img", "aria-label": "no picture" });
    const label = `${picture.prompt}, seed ${picture.seed}`;
    return h("a", { href: `${this.base}/p/${picture.id}`, title: label, "aria-label": label },
      h("img", { src: thumb(picture, 320), alt: "", loading: "lazy" }));
  }
}
