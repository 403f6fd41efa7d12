// The cluster as it was at the last poll: workers with their pools, the queue, what moved.

import { Flows } from "./flows.js";
import { byId, bytes, count, digits, element, plural, say, shape } from "./page.js";

const MOVES_MAX = 5;
const PIPS_MAX = 48;
const WAITING = ["recovering", "locating", "queued", "probation", "resuming"];
const SPARK = { width: 120, height: 30, points: 60 };

export class Panel {
  #workers = new Map();
  #flows = new Flows(byId("floor"), byId("flows"), (node_id) => this.#workers.get(node_id)?.element);

  show({ cluster, moves, rates, history }) {
    this.#showWorkers(cluster.workers, rates);
    this.#flows.show(cluster.workers, moves);
    showFigures(cluster, history);
    showRequests(cluster.requests);
    showSpark(history);
    for (const move of moves) showMove(move);
    say(byId("facts"), facts(cluster));
    const roles = cluster.services.map((service) => service.node_id);
    byId("facts").title = `Also there: ${roles.join(", ")}`;
    say(byId("cluster-note"), cluster.ready ? plural(cluster.workers.length, "worker") : cluster.reason);
  }

  #showWorkers(workers, rates) {
    for (const [node_id, box] of this.#workers) {
      if (workers.some((worker) => worker.node_id === node_id)) continue;
      box.element.remove();
      this.#workers.delete(node_id);
    }
    for (const worker of workers) {
      if (!this.#workers.has(worker.node_id)) this.#workers.set(worker.node_id, new Box(worker));
      const box = this.#workers.get(worker.node_id);
      box.show(worker, rates.get(worker.node_id));
      const column = byId(worker.accepts_streams ? "streams" : "prompts");
      if (box.element.parentElement !== column) insertByName(column, box.element);
    }
  }
}

function insertByName(column, box) {
  const after = [...column.children].find((one) => one.dataset.node > box.dataset.node);
  column.insertBefore(box, after ?? null);
}

/** One worker. */
class Box {
  #role = element("span", { className: "role" });
  #load = element("p");
  #blocks = element("p");
  #reads = element("p", { className: "reads" });
  #pool = new Pool();

  constructor(worker) {
    const name = element("b", { className: "mono", textContent: worker.node_id });
    this.element = element("section", { className: "worker" });
    this.element.append(element("header", {}, name, this.#role));
    this.element.append(this.#pool.element, this.#blocks, this.#load, this.#reads);
    this.element.dataset.node = worker.node_id;
  }

  show(worker, rates) {
    const { load } = worker;
    this.element.classList.toggle("draining", worker.draining);
    this.element.classList.toggle("busy", Boolean(load?.running));
    this.element.title = [worker.device, `on ${worker.host}`].filter(Boolean).join(" ");
    say(this.#role, roleOf(worker));
    if (!load) {
      say(this.#load, "has not reported yet");
      return;
    }
    const { blocks } = load;
    this.#pool.show(blocks, worker.num_blocks);
    this.#pool.element.ariaLabel =
      `${blocks.used - blocks.cached} blocks in use, ${blocks.leased} leased, ` +
      `${blocks.cached} cached, ${blocks.free} free`;
    say(this.#blocks, `${count(blocks.used + blocks.leased)} of ${count(worker.num_blocks)} blocks`);
    this.#blocks.title =
      `A block: ${bytes(worker.block_bytes)}. Prefix hits: ${count(load.prefix_hit_tokens_total)} ` +
      `of ${count(load.prefix_query_tokens_total)} prompt tokens`;
    const waiting = load.waiting ? `, ${count(load.waiting)} waiting` : "";
    say(this.#load, `${count(load.running)} running${waiting}, ${digits(rates.steps)} steps/s`);
    say(this.#reads, readsOf(load, rates));
  }
}

function roleOf(worker) {
  const streams = worker.accepts_streams ? "streams" : "";
  const prompts = worker.computes_prompts ? "prompts" : "";
  const words = [prompts, streams].filter(Boolean).join(" + ");
  return `${worker.draining ? "draining, " : ""}${words}${worker.shifted ? " (shifted)" : ""}`;
}

/** What it reads from others now, or else has read so far. */
function readsOf(load, rates) {
  const now = Object.entries(rates.readBytes).map(([name, rate]) => `${bytes(rate)}/s by ${name}`);
  if (now.length) return `reads ${now.join(", ")}`;
  const used = Object.entries(load.transports).filter(([, one]) => one.reads_total);
  const total = used.reduce((sum, [, one]) => sum + one.bytes_total, 0);
  return total ? `has read ${bytes(total)} by ${used.map(([name]) => name).join(", ")}` : "";
}

const CELLS = { columns: 24, rows: 4, pitch: 10, side: 8 };

/** A pool as a field of cells, each a share of its blocks: in use, leased, cached, free. */
class Pool {
  element = shape("svg", {
    class: "pool",
    role: "img",
    viewBox: `0 0 ${CELLS.columns * CELLS.pitch - 2} ${CELLS.rows * CELLS.pitch - 2}`,
  });
  #cells = Array.from({ length: CELLS.columns * CELLS.rows }, (_, index) =>
    shape("rect", {
      x: (index % CELLS.columns) * CELLS.pitch,
      y: Math.floor(index / CELLS.columns) * CELLS.pitch,
      width: CELLS.side,
      height: CELLS.side,
      rx: 1.5,
      class: "free",
    }),
  );

  constructor() {
    this.element.append(...this.#cells);
  }

  show(blocks, total) {
    const kinds = { active: blocks.used - blocks.cached, leased: blocks.leased, cached: blocks.cached };
    const classes = Object.entries(kinds).flatMap(([kind, number]) => {
      // One block in thousands is still seen.
      const cells = total ? Math.ceil((number * this.#cells.length) / total) : 0;
      return Array.from({ length: Math.max(0, cells) }, () => kind);
    });
    this.#cells.forEach((cell, index) => cell.setAttribute("class", classes[index] ?? "free"));
  }
}

function showFigures(cluster, history) {
  const recent = history.slice(-2);
  const rate = recent.reduce((sum, one) => sum + one, 0) / Math.max(1, recent.length);
  say(byId("tokens-rate"), digits(rate));
  const states = cluster.requests?.states ?? {};
  const live = Object.values(states).reduce((sum, one) => sum + one, 0);
  say(byId("live"), count(live));
  say(byId("queue"), count(waitingOf(states)));
}

const waitingOf = (states) => WAITING.reduce((sum, state) => sum + (states[state] ?? 0), 0);

/** A pip for each live request. */
function showRequests(requests) {
  const states = requests?.states ?? {};
  const kinds = {
    waiting: waitingOf(states),
    prefilling: states.prefilling ?? 0,
    decoding: states.decoding ?? 0,
    finishing: states.finishing ?? 0,
  };
  const strip = byId("requests");
  const words = Object.entries(kinds).filter(([, number]) => number);
  const text = words.map(([kind, number]) => `${count(number)} ${kind}`).join(", ") || "nothing runs";
  if (strip.dataset.text === text) return;
  strip.dataset.text = text;
  const pips = words.flatMap(([kind, number]) =>
    Array.from({ length: Math.min(number, PIPS_MAX) }, () => element("i", { className: kind })),
  );
  strip.replaceChildren(...pips.slice(0, PIPS_MAX), element("span", { textContent: text }));
}

function showSpark(history) {
  const top = Math.max(1, ...history);
  const { width, height, points } = SPARK;
  const at = history.map((rate, index) => {
    const x = width - ((history.length - 1 - index) * width) / (points - 1);
    return `${x.toFixed(1)},${(height - 2 - (rate / top) * (height - 4)).toFixed(1)}`;
  });
  const spark = byId("spark");
  if (!spark.firstChild) spark.append(shape("polyline"));
  spark.firstChild.setAttribute("points", at.join(" "));
}

function showMove({ source, reader, blocks, bytes: moved }) {
  const from = source === reader ? "its lower tiers" : source;
  const time = new Date().toLocaleTimeString("en-GB");
  const line = element("li", {}, element("time", { textContent: time }));
  line.append(` ${reader} read ${plural(blocks, "block")} from ${from}, ${bytes(moved)}`);
  const list = byId("moves");
  list.prepend(line);
  while (list.children.length > MOVES_MAX) list.lastChild.remove();
}

function facts({ requests }) {
  if (!requests) return "";
  const { alone, apart, fetching } = requests.placed_total;
  const said = [
    `Placed ${count(apart)} apart, ${count(alone)} alone, ${count(fetching)} fetching a prefix`,
    plural(requests.role_shifts_total, "role shift"),
    plural(requests.migrated_total, "migration"),
  ];
  const error = requests.ttft_prediction_error_median;
  if (error) said.push(`predicted TTFT off by ${count(100 * error)} % in the median`);
  return `${said.join("; ")}.`;
}
