// Arrows between workers: who has read blocks from whom, and blocks on their way.

import { plural, shape } from "./page.js";

const BLOCKS_MAX = 14;
const FLIGHT_MS = 800;
const APART_MS = 45;
const SIDE = 7;

export class Flows {
  #floor;
  #svg;
  #boxOf;
  #edges = new Map();
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  /** `boxOf(node_id)`: the element of a worker, if it is shown. */
  constructor(floor, svg, boxOf) {
    this.#floor = floor;
    this.#svg = svg;
    this.#boxOf = boxOf;
    this.#svg.append(arrowhead());
    new ResizeObserver(() => this.#lay()).observe(floor);
  }

  /** Lines for whatever moved since the workers' start, and what moved since the last poll. */
  show(workers, moves) {
    const seen = new Set();
    for (const { node_id: reader, load } of workers) {
      for (const source of Object.keys(load?.blocks_from ?? {})) {
        if (source === reader || !this.#boxOf(source)) continue;
        seen.add(`${source} ${reader}`);
        this.#edge(source, reader);
      }
    }
    for (const [name, edge] of this.#edges) {
      if (seen.has(name)) continue;
      edge.group.remove();
      this.#edges.delete(name);
    }
    this.#lay();
    for (const move of moves) this.#fly(move);
  }

  #edge(source, reader) {
    const name = `${source} ${reader}`;
    if (this.#edges.has(name)) return;
    const line = shape("path", { class: "edge", "marker-end": "url(#arrow)" });
    const group = shape("g");
    group.append(line);
    this.#svg.append(group);
    this.#edges.set(name, { source, reader, line, group });
  }

  #lay() {
    const floor = this.#floor.getBoundingClientRect();
    if (!floor.width) return; // folded
    for (const { source, reader, line } of this.#edges.values()) {
      const from = this.#boxOf(source);
      const to = this.#boxOf(reader);
      if (from && to) line.setAttribute("d", curve(sideOf(from, floor), sideOf(to, floor)));
    }
  }

  #fly({ source, reader, blocks }) {
    const edge = this.#edges.get(`${source} ${reader}`);
    const way = edge?.line.getAttribute("d");
    if (!way) return;
    edge.line.classList.add("moving");
    clearTimeout(edge.timer);
    edge.timer = setTimeout(() => edge.line.classList.remove("moving"), FLIGHT_MS + 600);
    this.#label(edge, blocks);
    if (this.#still.matches) return;
    for (let index = 0; index < Math.min(blocks, BLOCKS_MAX); index += 1) {
      const block = shape("rect", { class: "block", x: -SIDE / 2, y: -SIDE / 2, width: SIDE, height: SIDE, rx: 1.5 });
      block.style.offsetPath = `path("${way}")`;
      block.style.offsetRotate = "0deg";
      edge.group.append(block);
      const flight = block.animate(
        [
          { offsetDistance: "0%", opacity: 0 },
          { offsetDistance: "12%", opacity: 1, offset: 0.12 },
          { offsetDistance: "88%", opacity: 1, offset: 0.88 },
          { offsetDistance: "100%", opacity: 0 },
        ],
        { duration: FLIGHT_MS, delay: index * APART_MS, easing: "ease-in-out", fill: "backwards" },
      );
      flight.onfinish = () => block.remove();
    }
  }

  /** How many; near the source, for arrows to one reader meet at its end. */
  #label(edge, blocks) {
    const at = edge.line.getPointAtLength(0.45 * edge.line.getTotalLength());
    const text = shape("text", { class: "moved", x: at.x, y: at.y - 9 });
    text.textContent = plural(blocks, "block");
    edge.group.querySelector("text")?.remove();
    edge.group.append(text);
    setTimeout(() => text.remove(), FLIGHT_MS + 1400);
  }
}

function arrowhead() {
  const marker = shape("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  marker.append(shape("path", { d: "M0 0.5 8 4 0 7.5z" }));
  const definitions = shape("defs");
  definitions.append(marker);
  return definitions;
}

/** Where arrows end at a box, and on which side of the floor's middle it stands. */
function sideOf(box, floor) {
  const { left, right, top, height } = box.getBoundingClientRect();
  const onLeft = (left + right) / 2 < floor.left + floor.width / 2;
  return { onLeft, x: (onLeft ? right + 2 : left - 2) - floor.left, y: top - floor.top + height / 2 };
}

function curve(from, to) {
  // Two arrows between the same boxes lie beside each other.
  const shift = from.onLeft === to.onLeft ? 0 : from.onLeft ? -11 : 11;
  const [y1, y2] = [from.y + shift, to.y + shift];
  const bend = from.onLeft === to.onLeft ? 30 : Math.abs(to.x - from.x) / 2;
  const c1 = from.x + (from.onLeft ? bend : -bend);
  const c2 = to.x + (to.onLeft ? bend : -bend);
  return `M${from.x} ${y1}C${c1} ${y1} ${c2} ${y2} ${to.x} ${y2}`;
}
