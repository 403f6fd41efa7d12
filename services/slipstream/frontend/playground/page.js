// Elements and numbers. Text only ever enters the page as text.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function shape(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Sets the text of an element only where it changes: most numbers stay from poll to poll. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export const count = (value) => Math.round(value).toLocaleString("en");

export function plural(value, word) {
  return `${count(value)} ${word}${Math.round(value) === 1 ? "" : "s"}`;
}

/** Two or three digits that count: 0.42, 4.2, 42, 421. */
export function digits(value) {
  if (value >= 10 || value === 0) return count(value);
  return value.toFixed(value >= 1 ? 1 : 2);
}

export function milliseconds(ms) {
  return ms >= 10_000 ? `${digits(ms / 1000)} s` : `${digits(ms)} ms`;
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? digits(value) : count(value)} ${units[unit]}`;
}

export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // Browsers offer the clipboard to https and localhost alone.
  const area = element("textarea", { value: text, className: "offscreen" });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
