// What the server is asked, and what it says by itself.

export async function get(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== null && value !== "") query.set(name, value);
  }
  const text = query.toString();
  return answer(await fetch(text ? `${path}?${text}` : path));
}

export async function post(path, body) {
  return answer(await fetch(path, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  }));
}

async function answer(response) {
  if (response.ok) return response.json();
  const text = await response.text();
  let detail = text;
  try { detail = JSON.parse(text).detail || text; } catch { /* not JSON: the text itself */ }
  throw new Error(typeof detail === "string" ? detail : "the gallery did not understand the question");
}

export const thumb = (picture, size) => `/thumb/${picture.id}?s=${size}&v=${picture.v}`;
export const full = (picture) => `/picture/${picture.id}?v=${picture.v}`;

/** Runs and multiruns as they are now; listeners hear of every change. */
class Runs extends EventTarget {
  runs = new Map();
  sweeps = new Map();
  ready = false;
  connected = false;
  root = "";
  #asked = 0;

  start() {
    const source = new EventSource("/api/events");
    source.onmessage = (message) => this.#take(JSON.parse(message.data));
    source.onopen = () => this.#connection(true);
    source.onerror = () => this.#connection(false);
  }

  #connection(on) {
    this.connected = on;
    this.dispatchEvent(new Event("connection"));
  }

  #take(event) {
    if (event.type === "all") this.#replace(event);
    else if (event.type === "run") {
      const known = this.runs.get(event.run.id);
      this.runs.set(event.run.id, event.run);
      if (!known || (event.run.sweep !== null && JSON.stringify(known) !== JSON.stringify(event.run))) this.refresh();
    } else if (event.type === "gone") {
      this.runs.delete(event.run);
      this.refresh();
    }
    this.dispatchEvent(new CustomEvent("change", { detail: event }));
  }

  #replace(all) {
    this.runs = new Map(all.runs.map((run) => [run.id, run]));
    this.sweeps = new Map(all.sweeps.map((sweep) => [sweep.path, sweep]));
    this.ready = all.ready;
    this.root = all.root;
  }

  /** Ask for everything again, once for many calls: multiruns are added up by the server. */
  refresh() {
    if (this.#asked) return;
    this.#asked = setTimeout(async () => {
      this.#asked = 0;
      try {
        this.#replace(await get("/api/runs"));
        this.dispatchEvent(new CustomEvent("change", { detail: { type: "all" } }));
      } catch { /* the connection's own event tells of it */ }
    }, 400);
  }

  /** Numbers of the runs in a scope; null for all. */
  inScope(scope) {
    if (scope.startsWith("run:")) return new Set([Number(scope.slice(4))]);
    if (scope.startsWith("sweep:")) return new Set((this.sweeps.get(scope.slice(6)) || { jobs: [] }).jobs);
    return null;
  }
}

export const runs = new Runs();

export async function star(pictures, value) {
  await post("/api/star", { pictures, star: value });
}
