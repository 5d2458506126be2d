// One picture over the gallery: the whole window for it, and beside it what made it and what is near it.

import { full, get, thumb } from "./api.js";
import { button, copy, fill, h, icon, toast } from "./dom.js";
import { bytes, duration, when } from "./format.js";
import { Zoom } from "./zoom.js";

export class PictureView {
  isPictures = true;

  constructor(gallery, id, { go, base, close }) {
    Object.assign(this, { gallery, go, base, close, id: 0, position: null });
    this.zoom = new Zoom();
    this.image = h("img", { className: "large", alt: "", draggable: false });
    this.stage = h("div", { className: "stage", tabIndex: -1 }, this.image);
    this.zoom.attach(this.stage, this.image);
    this.zoom.onchange = (scale) => { this.percent.textContent = scale > 1.01 ? `${scale.toFixed(1)}×` : "fit"; };
    this.percent = h("span", { className: "zoom-level", "aria-hidden": "true" }, "fit");
    this.file = h("div", { className: "file-name" });
    this.place = h("span", { className: "place", role: "status" });
    this.starButton = button("star", "Star (s)", () => this.mark(1), "", { "aria-pressed": "false" });
    this.rejectButton = button("reject", "Reject (x)", () => this.mark(-1), "", { "aria-pressed": "false" });
    this.infoButton = button("info", "What made the picture (i)", () => this.#toggleInfo());
    this.closeButton = button("close", "Close (Esc)", () => this.close());
    this.before = button("back", "Previous picture (←)", () => this.step(-1), "", { className: "button bare side-button before" });
    this.after = button("next", "Next picture (→)", () => this.step(1), "", { className: "button bare side-button after" });
    this.info = h("aside", { className: "info", "aria-label": "About the picture", tabIndex: 0 });
    this.element = h("section", { className: "viewer", role: "dialog", "aria-modal": "true", "aria-label": "Picture" },
      h("div", { className: "viewer-top" }, this.closeButton, this.file, h("span", { className: "grow" }), this.place, this.percent,
        this.starButton, this.rejectButton, this.infoButton),
      h("div", { className: "viewer-body" }, h("div", { className: "stage-frame" }, this.stage, this.before, this.after), this.info));
    if (localStorage.getItem("info") === "hidden" || window.innerWidth < 760) this.element.classList.add("no-info");
    this.show(id);
  }

  begin() { this.closeButton.focus(); }

  async show(id) {
    if (this.id === id) return;
    this.id = id;
    this.zoom.fit();
    this.position = this.gallery.grid.positionOf(id) ?? this.position;
    let picture;
    try {
      picture = await get(`/api/picture/${id}`);
      if (this.gallery.grid.positionOf(id) === null) {
        const found = await get(`/api/position/${id}`, this.gallery.question());
        if (this.id === id) this.position = found.position;
      }
    } catch (error) {
      if (this.id === id) fill(this.info, h("p", { className: "problem", role: "alert" }, error.message));
      return;
    }
    if (this.id !== id) return;
    this.picture = picture;
    this.#draw();
    this.#ahead();
  }

  #draw() {
    const { picture } = this;
    const trouble = picture.status === "failed" ? picture.error || "failed" : picture.damage;
    this.stage.querySelector(".trouble")?.remove();
    this.image.hidden = Boolean(trouble);
    this.image.alt = picture.prompt;
    if (trouble) {
      this.image.removeAttribute("src");
      this.stage.append(h("div", { className: "trouble" }, icon("warn"), h("h2", {}, picture.status === "failed" ? "This picture failed" : "This picture is damaged"), h("p", {}, trouble)));
    } else {
      this.image.onerror = () => { if (!this.stage.querySelector(".trouble")) this.stage.append(h("div", { className: "trouble" }, icon("warn"), h("h2", {}, "The file cannot be shown"))); };
      this.image.src = full(picture);
    }
    fill(this.file, h("span", { className: "name", title: picture.path }, picture.file.replace(/^items\//, "").replace(/\/image\.\w+$/, "")),
      button("copy", "Copy the path", () => copy(picture.path, "path")));
    this.#drawMarks();
    this.#drawPlace();
    this.#drawInfo();
  }

  #drawPlace() {
    const total = this.gallery.grid.total;
    this.place.textContent = this.position === null ? "" : `${(this.position + 1).toLocaleString("en")} of ${total.toLocaleString("en")}`;
    this.before.disabled = this.position === null || this.position <= 0;
    this.after.disabled = this.position === null || this.position >= total - 1;
  }

  #drawMarks() {
    const { star } = this.picture;
    this.starButton.setAttribute("aria-pressed", String(star > 0));
    this.rejectButton.setAttribute("aria-pressed", String(star < 0));
    this.starButton.title = star > 0 ? "Remove the star (s)" : "Star (s)";
  }

  #drawInfo() {
    const { picture } = this;
    const { record } = picture;
    const params = { ...record.params };
    const size = params.width ? `${params.width} × ${params.height}` : "";
    delete params.width;
    delete params.height;
    const rows = [
      ["Size", [size, bytes(picture.bytes)].filter(Boolean).join(", ")],
      ...Object.entries(params).map(([name, value]) => [words(name), plain(value)]),
      ...Object.entries(record.inputs ?? {}).map(([name, value]) => [words(name), value?.path ?? plain(value)]),
      ["Model", record.model?.name], ["Weights", record.model?.digest?.slice(0, 12)],
      ...Object.entries(record.numerics ?? {}).map(([name, value]) => [words(name), plain(value)]),
      ["Attempt", record.attempt > 1 ? `${record.attempt}: the first ones gave no picture` : ""],
      ["Recovery", record.recovery ? plain(record.recovery) : ""],
      ["Linked from", record.reused_from ?? ""],
      ["Id", picture.name], ["Took", picture.seconds ? duration(picture.seconds) : ""],
      ["Written", when(picture.written)],
      ...Object.entries(record.metadata ?? {}).map(([name, value]) => [name, plain(value)]),
    ].filter(([, value]) => value !== undefined && value !== null && value !== "");
    const line = (name, value, what, text) => h("div", { className: "copy-row" }, h("h3", {}, name),
      button("copy", `Copy the ${what}`, () => copy(text ?? value, what)), h("p", { className: "text", dir: "auto" }, value));
    fill(this.info,
      line("Prompt", picture.prompt || "(empty)", "prompt", picture.prompt), line("Seed", picture.seed, "seed"),
      h("div", { className: "commands" },
        picture.command ? button("copy", "Copy the command that draws it again", () => copy(picture.command, "command"), "Command to draw it again") : null,
        picture.reproduce ? button("copy", "Copy the command that draws it again and compares the pixels", () => copy(picture.reproduce, "command"), "Command to check it") : null),
      h("dl", { className: "parameters" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { dir: "auto" }, value)))),
      this.#strip("Same prompt, other seeds", picture.neighbours.seeds, (near) => `seed ${near.seed}`),
      this.#strip("Same seed, other prompts", picture.neighbours.prompts, (near) => near.prompt),
      this.#strip("Same prompt and seed, other jobs", picture.neighbours.jobs, (near) => `run ${near.run}`),
      h("div", { className: "copy-row" }, h("h3", {}, "File"), button("copy", "Copy the path", () => copy(picture.path, "path")), h("p", { className: "path" }, picture.path)));
    this.info.scrollTop = 0;
  }

  #strip(title, pictures, label) {
    if (!pictures.length) return null;
    return h("div", { className: "strip-box" },
      h("div", { className: "strip-head" }, h("h3", {}, title),
        button("compare", "Compare with the nearest of these", () => this.go(`#/compare/${[this.picture.id, ...pictures.slice(0, 3).map((near) => near.id)].join(",")}`), "Compare")),
      h("div", { className: "strip" }, pictures.map((near) => h("a", {
        href: `${this.base}/p/${near.id}`, title: label(near), "aria-label": label(near),
        onclick: (event) => { if (near.run !== this.picture.run) { event.preventDefault(); this.go(`#/run/${near.run}/p/${near.id}`); } },
      }, h("img", { src: thumb(near, 160), alt: "", loading: "lazy" })))));
  }

  /** Have the pictures on both sides ready. */
  async #ahead() {
    for (const step of [1, -1]) {
      const near = this.position === null ? null : await this.gallery.grid.at(this.position + step);
      if (near && near.status === "done") new Image().src = full(near);
    }
  }

  async step(by) {
    if (this.position === null) return;
    const position = this.position + by;
    const next = await this.gallery.grid.at(position);
    if (!next) return;
    this.position = position;
    history.replaceState(null, "", `${this.base}/p/${next.id}${this.gallery.suffix()}`);
    await this.show(next.id);
  }

  async mark(value) {
    const wanted = this.picture.star === value ? 0 : value;
    if (!await this.gallery.mark([this.picture], wanted)) return;
    this.#drawMarks();
    toast(wanted > 0 ? "Starred" : wanted < 0 ? "Rejected" : "Mark removed");
  }

  #toggleInfo() {
    const hidden = this.element.classList.toggle("no-info");
    localStorage.setItem("info", hidden ? "hidden" : "shown");
  }

  key(event) {
    if (event.target.closest("dialog")) return false;
    const actions = {
      Escape: () => this.close(), ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      s: () => this.mark(1), x: () => this.mark(-1), i: () => this.#toggleInfo(),
      "+": () => this.zoom.by(1.4), "=": () => this.zoom.by(1.4), "-": () => this.zoom.by(1 / 1.4),
      0: () => this.zoom.scale > 1.01 ? this.zoom.fit() : this.zoom.by(this.zoom.actualScale(this.stage, this.image)),
      ArrowUp: () => this.zoom.pan(0, -0.1), ArrowDown: () => this.zoom.pan(0, 0.1),
    };
    if (!(event.key in actions)) return false;
    if (["ArrowUp", "ArrowDown"].includes(event.key) && this.info.contains(event.target)) return false;
    actions[event.key]();
    return true;
  }
}

const words = (name) => {
  const text = name.replaceAll("_", " ").replace(/^num /, "").replace("cfg", "CFG");
  return text[0].toUpperCase() + text.slice(1);
};
const plain = (value) => typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
