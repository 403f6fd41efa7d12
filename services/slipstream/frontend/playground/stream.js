// One streamed answer: reading it, and measuring it.

/** Ends an answer that the server refused or broke off. */
export class Refusal extends Error {
  constructor(error, status, requestId) {
    super(error.message ?? "The server gave no reason.");
    this.code = error.code ?? error.type ?? "error";
    this.status = status;
    this.requestId = requestId;
  }
}

const RESUMES_MAX = 16;
const RESUME_AFTER_MS = 500;

/**
 * Server-sent events with data, in lists: what one read brought has arrived at one time.
 * The decoder holds back the bytes of an unfinished character until the rest of it is there.
 */
export async function* arrivals(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      const found = blocks.map(eventOf).filter(({ data }) => data);
      if (found.length) yield found;
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading lets the server know
  }
}

function eventOf(block) {
  const lines = block.split(/\r?\n/);
  const of = (field) =>
    lines.filter((line) => line.startsWith(field)).map((line) => line.slice(field.length).trim());
  return { data: of("data:").join("\n"), id: of("id:").at(-1) ?? "" };
}

/**
 * Sends a request. `opened` is told the response, `arrived` each list of chunks with its raw texts.
 * A stream that breaks off is gone on with where it did, at whatever frontend answers. Throws a
 * Refusal, or what fetch throws when `signal` aborts it or nobody answers.
 */
export async function ask(request, { key, signal, opened, arrived }) {
  const place = { last: "", ended: false, requestId: "", status: 0 };
  for (let tries = 0; tries < RESUMES_MAX && !place.ended; tries++) {
    if (tries) await new Promise((done) => setTimeout(done, RESUME_AFTER_MS));
    try {
      await follow(request, { key, signal, opened, arrived }, place);
    } catch (error) {
      const fatal = error instanceof Refusal && ![409, 429, 502, 503].includes(error.status);
      if (signal?.aborted || !place.last || fatal) throw error;
    }
    if (!place.last) break;
  }
  if (!place.ended) {
    const error = { code: "stream_cut", message: "The stream broke off before its end." };
    throw new Refusal(error, place.status, place.requestId);
  }
}

/** One connection, from `place` on, which moves with what arrives. */
async function follow(request, { key, signal, opened, arrived }, place) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (place.last) headers["Last-Event-ID"] = place.last;
  const body = JSON.stringify(request);
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
  const requestId = (place.requestId = response.headers.get("x-request-id") ?? "");
  place.status = response.status;
  if (!place.last) opened(response);
  if (!response.ok) {
    throw new Refusal(await errorOf(response), response.status, requestId);
  }
  for await (const events of arrivals(response.body)) {
    const chunks = [];
    let error = null;
    for (const { data, id } of events) {
      if (data === "[DONE]") {
        place.ended = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) error = chunk.error;
      else chunks.push(chunk);
      place.last = id || place.last;
    }
    arrived(chunks, events.map(({ data }) => data));
    if (error) throw new Refusal(error, response.status, requestId);
  }
}

async function errorOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error ?? {};
  } catch {
    return { message: text.slice(0, 300) || response.statusText };
  }
}

/** When the tokens of one answer came, in ms from the moment the request was sent. */
export class Meter {
  #begun = performance.now();
  #first = null;
  #last = 0;
  #tokensAtFirst = 0;
  #gaps = [];
  tokens = 0;

  /** `tokens`: how many the answer has by now. */
  take(tokens) {
    const fresh = tokens - this.tokens;
    if (fresh <= 0) return;
    const now = performance.now() - this.#begun;
    if (this.#first === null) {
      this.#first = now;
      this.#tokensAtFirst = tokens;
    } else {
      this.#gaps.push({ ms: (now - this.#last) / fresh, tokens: fresh });
    }
    this.#last = now;
    this.tokens = tokens;
  }

  get ttft() {
    return this.#first;
  }

  /** Median time from token to token; tokens that came together share the wait for them. */
  get itl() {
    const sorted = this.#gaps.toSorted((a, b) => a.ms - b.ms);
    let left = (this.tokens - this.#tokensAtFirst) / 2;
    for (const gap of sorted) {
      left -= gap.tokens;
      if (left <= 0) return gap.ms;
    }
    return null;
  }

  /** Tokens in a second, from the first token on. */
  get rate() {
    const after = this.tokens - this.#tokensAtFirst;
    return after > 0 ? (1000 * after) / (this.#last - this.#first) : null;
  }
}
