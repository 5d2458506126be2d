// Two to four pictures: side by side with one zoom for all, or two over each other with a slider.

import { full, get } from "./api.js";
import { button, fill, h, icon } from "./dom.js";
import { Zoom } from "./zoom.js";

export function comparison(ids, query, { back }) { return new Comparison(ids, query, back); }

class Comparison {
  constructor(ids, query, back) {
    this.back = back;
    this.closeButton = button("close", "Close (Esc)", back);
    this.modes = h("div", { className: "segments", role: "group", "aria-label": "How to compare" });
    this.stages = h("div", { className: "stages" });
    this.element = h("section", { className: "viewer comparison", role: "dialog", "aria-modal": "true", "aria-label": "Compare" },
      h("div", { className: "viewer-top" }, this.closeButton, h("h2", {}, "Compare"), h("span", { className: "grow" }), this.modes,
        button("", "Fit (0)", () => this.zoom?.fit(), "Fit")),
      this.stages);
    this.mode = query.get("mode") === "slider" ? "slider" : "side";
    this.#load(ids);
  }

  begin() { this.closeButton.focus(); }

  async #load(ids) {
    try {
      this.pictures = await Promise.all(ids.map((id) => get(`/api/picture/${id}`)));
    } catch (error) {
      fill(this.stages, h("p", { className: "problem", role: "alert" }, error.message));
      return;
    }
    if (this.pictures.length < 2) {
      fill(this.stages, h("div", { className: "empty" }, icon("compare"), h("h2", {}, "Two pictures are needed"), h("p", {}, "Select two to four in the gallery with c, then choose Compare.")));
      return;
    }
    this.#draw();
  }

  #draw() {
    const two = this.pictures.length === 2;
    if (!two) this.mode = "side";
    const mode = (name, words, title) => button("", title, () => { this.mode = name; this.#draw(); }, words,
      { "aria-pressed": String(this.mode === name), disabled: name === "slider" && !two });
    fill(this.modes, mode("side", "Side by side", "Side by side (1)"), mode("slider", "Slider", two ? "Slider (2)" : "The slider takes two pictures"));
    this.zoom = new Zoom();
    if (this.mode === "slider") this.#slider();
    else this.#side();
  }

  #side() {
    this.stages.className = `stages of-${this.pictures.length}`;
    const differing = differences(this.pictures);
    fill(this.stages, this.pictures.map((picture) => {
      const image = h("img", { className: "large", alt: picture.prompt, src: full(picture), draggable: false });
      const stage = h("div", { className: "stage" }, image);
      const figure = h("figure", {}, stage, caption(picture, differing));
      queueMicrotask(() => this.zoom.attach(stage, image));
      return figure;
    }));
  }

  #slider() {
    this.stages.className = "stages slider";
    const [first, second] = this.pictures;
    const images = [first, second].map((picture) => h("img", { className: "large", alt: picture.prompt, src: full(picture), draggable: false }));
    const cover = h("div", { className: "cover" }, images[1]);
    const handle = h("div", { className: "handle", "aria-hidden": "true" });
    const range = h("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50, "aria-label": "Share of the first picture that is shown", className: "divider" });
    const move = () => {
      cover.style.clipPath = `inset(0 0 0 ${range.value}%)`;
      handle.style.left = `${range.value}%`;
    };
    range.addEventListener("input", move);
    const stage = h("div", { className: "stage" }, images[0], cover, handle);
    handle.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      handle.setPointerCapture(event.pointerId);
      const drag = (moved) => {
        const box = stage.getBoundingClientRect();
        range.value = Math.min(100, Math.max(0, ((moved.clientX - box.left) / box.width) * 100));
        move();
      };
      handle.addEventListener("pointermove", drag);
      handle.addEventListener("pointerup", () => handle.removeEventListener("pointermove", drag), { once: true });
    });
    const differing = differences(this.pictures);
    fill(this.stages, stage, range, h("div", { className: "captions" }, caption(first, differing), caption(second, differing)));
    move();
    this.zoom.attach(stage, ...images);
  }

  key(event) {
    if (event.target.closest("dialog") || event.target.matches?.("input[type=range]") && event.key.startsWith("Arrow")) return false;
    const step = 0.06;
    const actions = {
      Escape: () => this.back(), "+": () => this.zoom.by(1.4), "=": () => this.zoom.by(1.4), "-": () => this.zoom.by(1 / 1.4),
      0: () => this.zoom.fit(), ArrowLeft: () => this.zoom.pan(-step, 0), ArrowRight: () => this.zoom.pan(step, 0),
      ArrowUp: () => this.zoom.pan(0, -step), ArrowDown: () => this.zoom.pan(0, step),
      1: () => { this.mode = "side"; this.#draw(); }, 2: () => { this.mode = "slider"; this.#draw(); },
    };
    if (!this.zoom || !(event.key in actions)) return false;
    actions[event.key]();
    return true;
  }
}

const settings = (picture) => ({ ...picture.record.params, ...picture.record.numerics, model: picture.record.model?.name, seed: picture.seed });

/** What is not the same in all of them. */
function differences(pictures) {
  const all = pictures.map(settings);
  const names = [...new Set(all.flatMap(Object.keys))];
  return names.filter((name) => new Set(all.map((one) => JSON.stringify(one[name]))).size > 1);
}

function caption(picture, differing) {
  const own = settings(picture);
  return h("figcaption", {}, h("span", { className: "prompt", dir: "auto" }, picture.prompt),
    h("span", { className: "differences" }, differing.slice(0, 6).map((name) => h("span", { className: "tag" }, `${name.replaceAll("_", " ").replace("num inference ", "")} ${own[name]}`))));
}
