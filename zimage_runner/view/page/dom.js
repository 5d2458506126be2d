// Elements made from data. Texts become text nodes: nothing that a run contains is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  back: "M15 5l-7 7 7 7",
  next: "M9 5l7 7-7 7",
  star: "M12 3.6l2.6 5.3 5.8.8-4.2 4.1 1 5.8-5.2-2.7-5.2 2.7 1-5.8L3.600 9.700l5.800-.800z",
  reject: "M6 6l12 12M18 6L6 18",
  close: "M6 6l12 12M18 6L6 18",
  check: "M5 12.500l4.500 4.500L19 7.500",
  search: "M10.500 17a6.500 6.500 0 1 0 0-13 6.500 6.500 0 0 0 0 13zM15.500 15.500L20.500 20.500",
  grid: "M4 4h6.500v6.500H4zM13.500 4H20v6.500h-6.500zM4 13.500h6.500V20H4zM13.500 13.500H20V20h-6.500z",
  compare: "M4 5h7v14H4zM13 5h7v14h-7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  warn: "M12 4l9 16H3zM12 10v4.500M12 17.200v.300",
  down: "M6 9l6 6 6-6",
  save: "M12 4v11M7.500 11l4.500 4.500 4.500-4.500M5 20h14",
  up: "M12 19V6M6.500 11L12 5.500 17.500 11",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4",
  info: "M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM12 11v5M12 7.800v.200",
};

/** An element: properties are set as such, `data`, `aria-*`, `role` and `for` as attributes; null children are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name.includes("-") || name === "role" || name === "for" || name === "list") element.setAttribute(name, value);
    else element[name] = value;
  }
  add(element, children);
  return element;
}

export function add(element, children) {
  for (const child of children.flat(9)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

export function fill(element, ...children) {
  element.replaceChildren();
  add(element, children);
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; without words its label is read out and shown as a hint. */
export function button(name, label, onclick, words = "", more = {}) {
  const given = words ? {} : { "aria-label": label };
  return h("button", { type: "button", className: words ? "button" : "button bare", title: label, onclick, ...given, ...more },
    name ? icon(name) : null, words ? h("span", {}, words) : null);
}

export function select(label, options, value, onchange) {
  const list = h("select", { "aria-label": label, title: label, onchange: () => onchange(list.value) },
    options.map(([key, text]) => h("option", { value: key, selected: key === value }, text)));
  return list;
}

let hideToast = 0;

/** Say something at the foot of the page for a moment. */
export function toast(text) {
  const place = document.getElementById("toast");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(hideToast);
  hideToast = setTimeout(() => place.classList.remove("shown"), 2600);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { value: text, className: "off-screen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(`${what} copied`);
}
