// What is sent along with the messages. What nobody has touched is not sent: the model's default.

import { byId, say } from "./page.js";

const STORE = "slipstream.settings";
const KEY_STORE = "slipstream.key";
const SLIDERS = ["temperature", "top_p"];
const NUMBERS = ["max_tokens", "seed"];
const FIELDS = ["system", ...SLIDERS, ...NUMBERS];

export class Settings {
  #touched = new Set();

  constructor() {
    this.#restore();
    for (const name of FIELDS) {
      byId(name).addEventListener("input", () => {
        this.#touch(name);
        this.#changed();
      });
    }
    byId("key").addEventListener("input", () => store(KEY_STORE, this.key));
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
    byId("reset").addEventListener("click", () => this.#reset());
    this.#changed();
  }

  get key() {
    return byId("key").value.trim();
  }

  get system() {
    return byId("system").value.trim();
  }

  /** The members of a request that are set, as numbers. */
  get sampling() {
    const named = [...SLIDERS, ...NUMBERS].filter((name) => this.#touched.has(name));
    return Object.fromEntries(named.map((name) => [name, Number(byId(name).value)]));
  }

  #touch(name) {
    const control = byId(name);
    if (control.value.trim() === "" || !control.validity.valid) this.#touched.delete(name);
    else this.#touched.add(name);
  }

  #reset() {
    byId("settings").querySelectorAll("input[type=range], input[type=number]").forEach((control) => {
      control.value = control.defaultValue;
    });
    for (const name of [...SLIDERS, ...NUMBERS]) this.#touched.delete(name);
    this.#changed();
  }

  #changed() {
    for (const name of SLIDERS) {
      const set = this.#touched.has(name);
      byId(name).classList.toggle("untouched", !set);
      say(byId(`${name}-shown`), set ? byId(name).value : "default");
    }
    const said = Object.entries(this.sampling).map(([name, value]) => `${name} ${value}`);
    if (this.system) said.unshift("system prompt");
    say(byId("request-note"), said.join(", ") || "the model’s defaults");
    const kept = [...this.#touched].map((name) => [name, byId(name).value]);
    store(STORE, JSON.stringify(Object.fromEntries(kept)));
  }

  #restore() {
    byId("key").value = stored(KEY_STORE) ?? "";
    let kept = {};
    try {
      kept = JSON.parse(stored(STORE) ?? "{}");
    } catch {
      return; // somebody else's
    }
    for (const name of FIELDS.filter((field) => field in kept)) {
      byId(name).value = kept[name];
      this.#touch(name);
    }
  }
}

// A browser may be told to keep nothing; then a reload forgets.
function store(name, text) {
  try {
    sessionStorage.setItem(name, text);
  } catch {
    // not kept
  }
}

function stored(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}
