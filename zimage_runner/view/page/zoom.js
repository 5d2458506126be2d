// Zoom and pan of one picture, or of several together: all stages of one Zoom show the same part.

const MOST = 32;

export class Zoom {
  scale = 1; // 1: the whole picture fits
  x = 0; // of the centre, as shares of the picture
  y = 0;
  #stages = new Set();
  #frame = 0;

  /** Let `stage` show `image` (a child of it) with this zoom. */
  attach(stage, ...images) {
    const entry = { stage, images };
    this.#stages.add(entry);
    stage.addEventListener("wheel", (event) => this.#wheel(event, stage), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.#grab(event, stage));
    stage.addEventListener("dblclick", (event) => {
      event.preventDefault();
      if (this.scale > 1.01) this.fit();
      else this.#around(event, stage, this.actualScale(stage, images[0]));
    });
    for (const image of images) image.addEventListener("load", () => this.draw());
    if (window.ResizeObserver) new ResizeObserver(() => this.draw()).observe(stage);
    this.draw();
  }

  /** The scale at which one pixel of the picture is one of the screen; at least 2 for small ones. */
  actualScale(stage, image) {
    const fitted = Math.min(stage.clientWidth / (image.naturalWidth || 1), stage.clientHeight / (image.naturalHeight || 1));
    const actual = 1 / (Math.min(fitted, this.largestFit(image)) * devicePixelRatio);
    return actual > 1.05 ? actual : 2;
  }

  /** Small pictures are enlarged to fill the stage, but to no more than 8 times. */
  largestFit() { return 8; }

  fit() { this.scale = 1; this.x = this.y = 0; this.draw(); }

  by(factor) { this.scale = Math.min(MOST, Math.max(1, this.scale * factor)); this.#keepInside(); this.draw(); }

  pan(dx, dy) { this.x += dx / this.scale; this.y += dy / this.scale; this.#keepInside(); this.draw(); }

  #wheel(event, stage) {
    event.preventDefault();
    this.#around(event, stage, this.scale * Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0018)));
  }

  /** Zoom so that what is under the pointer stays there. */
  #around(event, stage, scale) {
    const next = Math.min(MOST, Math.max(1, scale));
    const box = stage.getBoundingClientRect();
    const size = this.#shown(stage);
    const px = (event.clientX - box.left - box.width / 2) / size.width;
    const py = (event.clientY - box.top - box.height / 2) / size.height;
    this.x += px / this.scale - px / next;
    this.y += py / this.scale - py / next;
    this.scale = next;
    this.#keepInside();
    this.draw();
  }

  #grab(event, stage) {
    if (event.button !== 0 || event.target.closest("button, input, a")) return;
    const start = { x: event.clientX, y: event.clientY, cx: this.x, cy: this.y };
    const size = this.#shown(stage);
    const move = (moved) => {
      this.x = start.cx - (moved.clientX - start.x) / size.width / this.scale;
      this.y = start.cy - (moved.clientY - start.y) / size.height / this.scale;
      this.#keepInside();
      this.draw();
    };
    const end = () => {
      stage.removeEventListener("pointermove", move);
      stage.classList.remove("grabbed");
    };
    stage.classList.add("grabbed");
    stage.setPointerCapture(event.pointerId);
    stage.addEventListener("pointermove", move);
    stage.addEventListener("pointerup", end, { once: true });
    stage.addEventListener("pointercancel", end, { once: true });
  }

  /** Size in which the stage's picture is shown at scale 1. */
  #shown(stage) {
    const entry = [...this.#stages].find((one) => one.stage === stage);
    return fitted(stage, entry.images[0]);
  }

  #keepInside() {
    const room = Math.max(0, 0.5 - 0.5 / this.scale);
    this.x = Math.min(room, Math.max(-room, this.x));
    this.y = Math.min(room, Math.max(-room, this.y));
  }

  draw() {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      for (const { stage, images } of this.#stages) {
        for (const image of images) {
          const size = fitted(stage, image);
          image.style.width = `${size.width}px`;
          image.style.height = `${size.height}px`;
          const dx = -this.x * size.width * this.scale, dy = -this.y * size.height * this.scale;
          image.style.transform = `translate(-50%, -50%) translate(${dx}px, ${dy}px) scale(${this.scale})`;
          const pixels = (size.width * this.scale) / (image.naturalWidth || 1);
          image.classList.toggle("pixels", pixels * devicePixelRatio > 3);
        }
        stage.classList.toggle("zoomed", this.scale > 1.01);
      }
      this.onchange?.(this.scale);
    });
  }
}

function fitted(stage, image) {
  const width = image.naturalWidth || 1, height = image.naturalHeight || 1;
  const scale = Math.min(stage.clientWidth / width, stage.clientHeight / height, 8);
  return { width: width * scale, height: height * scale };
}
