// The conversation: what was said, the answer that is being made, and the way to the next one.

import { byId, count, element, say } from "./page.js";
import { Answer, Message } from "./message.js";
import { ask, Meter } from "./stream.js";

/** So near to its end, the conversation is scrolled along with what arrives. */
const NEAR_PX = 80;

export class Chat {
  #said = [];
  #settings;
  #model = "";
  #contextTokens = 0;
  #stopping = null;

  constructor(settings) {
    this.#settings = settings;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      // While an input method composes, Enter chooses a character.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    byId("stop").addEventListener("click", () => this.stop());
    this.#idle();
  }

  /** What serves, and how many tokens it can look back on. */
  serve(model, contextTokens) {
    this.#model = model;
    this.#contextTokens = contextTokens;
  }

  stop() {
    this.#stopping?.abort();
  }

  forget() {
    this.stop();
    for (const message of this.#said) message.element.remove();
    this.#said = [];
    byId("empty").hidden = false;
    say(byId("context"), "");
    byId("prompt").focus();
  }

  #submit() {
    const prompt = byId("prompt");
    if (this.#stopping || prompt.value.trim() === "") return;
    this.#append(new Message("user", prompt.value.trim()));
    prompt.value = "";
    this.#answer();
  }

  #append(message) {
    byId("empty").hidden = true;
    this.#said.push(message);
    byId("messages").append(message.element);
    message.element.scrollIntoView({ block: "end" });
  }

  #again(answer) {
    this.stop();
    const index = this.#said.indexOf(answer);
    if (index < 0) return;
    for (const message of this.#said.splice(index)) message.element.remove();
    this.#answer();
  }

  #request() {
    const { system, sampling } = this.#settings;
    const before = system ? [{ role: "system", content: system }] : [];
    const said = this.#said.filter((message) => !(message instanceof Answer) || message.usable);
    return {
      model: this.#model,
      messages: [...before, ...said.map((message) => message.spoken)],
      ...sampling,
      stream: true,
      // The count in each chunk says how many tokens it brought; a character may take several.
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
  }

  async #answer() {
    const stopping = new AbortController();
    this.#stopping = stopping;
    const request = this.#request();
    const key = this.#settings.key;
    const exchange = { request, withKey: key !== "", status: "no answer", headers: [], events: [] };
    const answer = new Answer(exchange, new Meter(), (one) => this.#again(one));
    this.#append(answer);
    this.#busy();
    try {
      await ask(request, {
        key,
        signal: stopping.signal,
        opened: (response) => answer.opened(response),
        arrived: (chunks, texts) => this.#keepingEnd(() => answer.arrived(chunks, texts)),
      });
      answer.ended();
    } catch (error) {
      answer.ended(error);
    }
    if (this.#stopping !== stopping) return; // asked again meanwhile
    this.#stopping = null;
    this.#idle();
    if (this.#said.includes(answer)) this.#keepingEnd(() => this.#showContext(answer.context));
  }

  #keepingEnd(change) {
    const view = byId("messages");
    const near = view.scrollHeight - view.scrollTop - view.clientHeight < NEAR_PX;
    change();
    if (near) view.scrollTop = view.scrollHeight;
  }

  #showContext(tokens) {
    if (!tokens) return;
    const limit = this.#contextTokens ? ` of ${count(this.#contextTokens)}` : "";
    say(byId("context"), `${count(tokens)}${limit} tokens`);
  }

  #busy() {
    byId("send").hidden = true;
    byId("stop").hidden = false;
  }

  #idle() {
    byId("send").hidden = false;
    byId("stop").hidden = true;
  }
}

/** Buttons that fill the prompt, for a first look. */
export function offerSamples() {
  for (const [label, text] of SAMPLES) {
    const button = element("button", { type: "button", textContent: label });
    button.addEventListener("click", () => {
      byId("prompt").value = text();
      byId("prompt").focus();
    });
    byId("samples").append(button);
  }
}

const SAMPLES = [
  ["A short question", () => "What is the capital of France?"],
  ["A long answer", () => "Tell the story of a lighthouse keeper who talks with the fog."],
  ["A long prompt, for blocks to move", longPrompt],
];

/** A log that differs at each call from its first line on, so that no cache has it. */
function longPrompt() {
  const weather = ["calm", "fog", "rain", "a gale", "snow", "clear skies", "thunder"];
  const any = (things) => things[Math.floor(Math.random() * things.length)];
  const days = Array.from({ length: 40 }, (_, day) => {
    return `Day ${day + 1}: ${any(weather)} in the morning, ${any(weather)} at night, ` +
      `${Math.floor(Math.random() * 40)} ships.`;
  });
  return `${days.join("\n")}\n\nThis is the log of a lighthouse. Describe its weather.`;
}
