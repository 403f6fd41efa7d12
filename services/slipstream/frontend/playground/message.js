// One message on the page: its text, what it took, and what can be done with it.

import { count, digits, element, milliseconds, say } from "./page.js";
import { copied, showRaw } from "./snippets.js";
import { Refusal } from "./stream.js";

const EVENTS_MAX = 5000;

/** What each number means, for those who point at it. */
const MEANINGS = {
  TTFT: "Time to first token, from sending the request, measured in this page",
  predicted: "What placement expected from leaving the queue to the first token",
  ITL: "Inter-token latency: median time from token to token",
  rate: "Tokens in a second, from the first token on",
  prompt: "Tokens of the prompt, with all that was said before",
  cached: "Tokens of the prompt whose KV blocks were found instead of computed",
  output: "Tokens of the answer",
  path: "Who computed the prompt, then who made the tokens; the arrow is a transfer of KV blocks",
};

export class Message {
  #text = element("div", { className: "text" });
  #actions = element("footer", { className: "actions" });
  content = "";

  constructor(role, content = "") {
    this.role = role;
    this.element = element("article", { className: `message ${role}` }, this.#text, this.#actions);
    this.add(content);
  }

  add(text) {
    this.content += text;
    this.#text.append(text);
  }

  get spoken() {
    return { role: this.role, content: this.content };
  }

  action(label, title, run) {
    const button = element("button", { type: "button", textContent: label, title });
    button.addEventListener("click", () => run(button));
    this.#actions.append(button);
  }
}

export class Answer extends Message {
  #thoughts = element("div", { className: "thoughts", title: "What the model thinks before it answers" });
  #numbers = element("dl", { className: "numbers" });
  #shown = new Map();
  #predicted = "";
  #usage = null;
  /** Whether there is something that a next request may build on. */
  usable = false;

  constructor(exchange, meter, again) {
    super("assistant");
    this.exchange = exchange;
    this.meter = meter;
    this.element.ariaBusy = "true";
    this.element.append(this.#numbers);
    this.action("Copy", "Copy the text", (button) => copied(button, this.content));
    this.action("Regenerate", "Ask again; what follows is forgotten", () => again(this));
    this.action("Raw", "The request and its answer; as curl, as Python", () => showRaw(exchange));
  }

  opened(response) {
    this.exchange.status = `HTTP ${response.status}`;
    this.exchange.headers = [...response.headers];
    const path = response.headers.get("x-slipstream-path");
    if (path) this.#show("path", path.replaceAll(">", " → "));
    this.#predicted = fieldOf(response.headers.get("x-slipstream-decision") ?? "", "ttft_ms");
  }

  arrived(chunks, texts) {
    this.exchange.events.push(...texts);
    this.exchange.events.splice(0, this.exchange.events.length - EVENTS_MAX);
    let text = "";
    let thought = "";
    for (const { choices, usage } of chunks) {
      text += choices[0]?.delta.content ?? "";
      thought += choices[0]?.delta.reasoning_content ?? "";
      this.finish = choices[0]?.finish_reason ?? this.finish;
      this.#usage = usage ?? this.#usage;
    }
    if (thought) this.#think(thought);
    if (text) this.add(text);
    if (this.#usage) this.meter.take(this.#usage.completion_tokens);
    this.#measured();
  }

  /** `error`: what ended it before its end, if something did. */
  ended(error = null) {
    this.element.ariaBusy = "false";
    this.usable = this.content !== "";
    const stopped = error?.name === "AbortError";
    if (stopped) this.#note("stopped", "You stopped it.");
    else if (error) this.#problem(error);
    else if (this.finish === "length") this.#note("length", "It reached max tokens, or the context's end.");
  }

  /** Tokens of the conversation with this answer. */
  get context() {
    return this.#usage?.total_tokens ?? 0;
  }

  /** Before the answer, and no part of the conversation. */
  #think(text) {
    if (!this.#thoughts.isConnected) this.element.prepend(this.#thoughts);
    this.#thoughts.append(text);
  }

  #measured() {
    const { ttft, itl, rate } = this.meter;
    if (ttft !== null) this.#show("TTFT", milliseconds(ttft));
    if (this.#predicted) this.#show("predicted", milliseconds(Number(this.#predicted)));
    if (itl !== null) this.#show("ITL", milliseconds(itl));
    if (rate !== null) this.#show("rate", digits(rate), "tokens/s");
    if (!this.#usage) return;
    const details = this.#usage.prompt_tokens_details;
    this.#show("prompt", count(this.#usage.prompt_tokens));
    if (details) this.#show("cached", count(details.cached_tokens));
    this.#show("output", count(this.#usage.completion_tokens));
  }

  #show(name, text, label = name) {
    let value = this.#shown.get(name);
    if (!value) {
      value = element("dd");
      const pair = element("div", { className: name, title: MEANINGS[name] });
      pair.append(element("dt", { textContent: label }), value);
      const later = Object.keys(MEANINGS).slice(Object.keys(MEANINGS).indexOf(name) + 1);
      const next = later.map((one) => this.#shown.get(one)).find(Boolean);
      this.#numbers.insertBefore(pair, next?.parentElement ?? null);
      this.#shown.set(name, value);
    }
    say(value, text);
  }

  #note(name, title) {
    this.#numbers.append(element("div", { className: "end", title }, element("dd", { textContent: name })));
  }

  #problem(error) {
    const refused = error instanceof Refusal;
    const problem = element("p", { className: "problem", role: "alert" });
    const code = refused ? error.code : "no_answer";
    const text = refused ? error.message : `Nobody answers: ${error.message}.`;
    problem.append(element("b", { textContent: code }), ` ${text}`);
    const ids = [];
    if (refused && error.status >= 400) ids.push(`HTTP ${error.status}`);
    if (refused && error.requestId) ids.push(`request ${error.requestId}`);
    if (ids.length) problem.append(element("small", { textContent: ids.join(", ") }));
    this.#numbers.before(problem);
  }
}

function fieldOf(decision, name) {
  const first = decision.split(",")[0];
  const field = first.split(";").find((part) => part.trim().startsWith(`${name}=`));
  return field?.split("=")[1] ?? "";
}
