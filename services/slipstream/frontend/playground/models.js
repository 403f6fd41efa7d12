// Which model answers, where there are several.

import { byId, element } from "./page.js";

export class Choice {
  #models = [];
  #chosen;

  /** `chosen` is told the model, at first and whenever it is another one. */
  constructor(chosen) {
    this.#chosen = chosen;
    byId("model").addEventListener("change", () => this.#tell());
  }

  /** What there is now: [{ name, max_model_len, parent }]. What was chosen stays, while it is there. */
  offer(models) {
    const select = byId("model");
    const names = models.map(labelled);
    if (names.join("\n") !== this.#models.map(labelled).join("\n")) {
      const before = select.value;
      select.replaceChildren(...models.map((model) => option(model)));
      if (models.some((model) => model.name === before)) select.value = before;
    }
    this.#models = models;
    select.disabled = models.length < 2;
    this.#tell();
  }

  #tell() {
    const model = this.#models.find(({ name }) => name === byId("model").value);
    this.#chosen(model ?? { name: "", max_model_len: 0 });
  }
}

function option(model) {
  return element("option", { value: model.name }, labelled(model));
}

function labelled({ name, parent }) {
  return parent ? `${name} (${parent})` : name;
}
