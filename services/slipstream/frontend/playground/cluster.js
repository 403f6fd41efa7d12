// What the cluster does: asked for each second while somebody looks, and compared with before.

const PERIOD_MS = 1000;
/** Where the cluster is for other eyes; the audit log has a line for each time. */
const LOCKED_MS = 10000;
const PATIENCE_MS = 5000;
/** Polls: a minute. */
const KEPT = 61;
/** Polls that a rate is taken over; workers report at other moments than we ask. */
const WINDOW = 3;

export class Watch {
  #polls = [];
  #show;
  #key;
  #timer = 0;

  /**
   * `show` is told { cluster, moves, rates, history } after each poll; { models } alone where
   * the cluster is for other eyes; or { error }. `key` says the key to be shown; empty: none.
   */
  constructor(show, key) {
    this.#show = show;
    this.#key = key;
    document.addEventListener("visibilitychange", () => this.now());
    this.now();
  }

  /** Does not wait for the next time. */
  now() {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#poll();
  }

  async #poll() {
    let again_ms = PERIOD_MS;
    try {
      const response = await this.#get("cluster");
      if (response.status === 401 || response.status === 403) again_ms = LOCKED_MS;
      if (response.status === 403) this.#show({ models: await this.#models() });
      else this.#take(await checked(response).json());
    } catch (error) {
      this.#show({ error });
    }
    clearTimeout(this.#timer); // of a poll that began while the page came back
    if (!document.hidden) this.#timer = setTimeout(() => this.#poll(), again_ms);
  }

  #get(path) {
    const headers = this.#key() ? { Authorization: `Bearer ${this.#key()}` } : {};
    return fetch(path, { cache: "no-store", headers, signal: AbortSignal.timeout(PATIENCE_MS) });
  }

  async #models() {
    const models = await checked(await this.#get("v1/models")).json();
    return models.data.map(({ id, max_model_len, parent }) => ({ name: id, max_model_len, parent }));
  }

  #take(cluster) {
    const now = { at_ms: performance.now(), cluster };
    const last = this.#polls.at(-1);
    this.#polls.push(now);
    this.#polls.splice(0, this.#polls.length - KEPT);
    const before = this.#polls.at(-1 - WINDOW) ?? this.#polls[0];
    this.#show({
      cluster,
      moves: last ? movesBetween(last.cluster, cluster) : [],
      rates: new Map(cluster.workers.map((worker) => [worker.node_id, rates(worker, before, now)])),
      history: tokenRates(this.#polls),
    });
  }
}

function checked(response) {
  if (response.ok) return response;
  const error = new Error(response.status === 401 ? "The server asks for an API key." : `HTTP ${response.status}`);
  throw Object.assign(error, { locked: response.status === 401 });
}

/** The same life of a worker at an earlier poll, if both have reported. */
function earlier(worker, cluster) {
  const found = cluster.workers.find((one) => one.node_id === worker.node_id);
  return found?.epoch === worker.epoch && found.load && worker.load ? found : null;
}

/** Blocks that came into a pool between two polls: { source, reader, blocks, bytes } each. */
export function movesBetween(before, now) {
  return now.workers.flatMap((worker) => {
    const past = earlier(worker, before);
    if (!past) return [];
    return Object.entries(worker.load.blocks_from).flatMap(([source, total]) => {
      const blocks = total - (past.load.blocks_from[source] ?? 0);
      if (blocks <= 0) return [];
      return [{ source, reader: worker.node_id, blocks, bytes: blocks * worker.block_bytes }];
    });
  });
}

/** { steps, readBytes: { transport: bytes } } in a second. */
function rates(worker, before, now) {
  const past = earlier(worker, before.cluster);
  const seconds = (now.at_ms - before.at_ms) / 1000;
  if (!past || seconds <= 0) return { steps: 0, readBytes: {} };
  const read = Object.entries(worker.load.transports).map(([name, { bytes_total }]) => {
    return [name, (bytes_total - (past.load.transports[name]?.bytes_total ?? 0)) / seconds];
  });
  return {
    steps: (worker.load.steps_total - past.load.steps_total) / seconds,
    readBytes: Object.fromEntries(read.filter(([, rate]) => rate > 0)),
  };
}

/** Tokens in a second between two polls of one frontend; behind an ingress they take turns. */
function tokenRates(polls) {
  const last = new Map();
  return polls.flatMap(({ at_ms, cluster }) => {
    const { node_id, tokens_total } = cluster.frontend;
    const before = last.get(node_id);
    last.set(node_id, { at_ms, tokens_total });
    if (!before) return [];
    // One that began anew counts from nothing.
    return [Math.max(0, (1000 * (tokens_total - before.tokens_total)) / (at_ms - before.at_ms))];
  });
}
