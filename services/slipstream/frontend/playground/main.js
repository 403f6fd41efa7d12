// Puts the page together.

import { Chat, offerSamples } from "./chat.js";
import { Watch } from "./cluster.js";
import { Choice } from "./models.js";
import { byId, say } from "./page.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";
import { wireRaw } from "./snippets.js";

const settings = new Settings();
const chat = new Chat(settings);
const panel = new Panel();
const choice = new Choice((model) => chat.serve(model.name, model.max_model_len));

const WORDS = {
  gone: "no answer",
  locked: "API key?",
  draining: "stopping",
  ready: "ready",
  waiting: "not ready",
};

function show(seen) {
  const state = stateOf(seen);
  const { models, cluster, error } = seen;
  byId("ready").dataset.state = state;
  byId("ready").title = error?.message ?? cluster?.reason ?? "";
  say(byId("ready"), WORDS[state]);
  if (state === "locked" && !settings.key) byId("request-fold").open = true; // the key goes there
  if (error) return;
  choice.offer(models ?? cluster.models);
  if (models) say(byId("cluster-note"), "for operators");
  else panel.show(seen);
}

function stateOf({ models, cluster, error }) {
  if (error) return error.locked ? "locked" : "gone";
  if (models) return "ready"; // who could not be served is told so
  return cluster.draining ? "draining" : cluster.ready ? "ready" : "waiting";
}

function keys(event) {
  const typing = event.target.matches?.("textarea, input");
  if (event.key === "Escape" && !byId("raw").open) chat.stop();
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    byId("prompt").focus();
  }
}

// Where there is no room beside the chat, the panel lies folded below it.
if (matchMedia("(max-width: 900px)").matches) byId("cluster-fold").open = false;
offerSamples();
wireRaw();
document.addEventListener("keydown", keys);
byId("new-chat").addEventListener("click", () => chat.forget());
const watch = new Watch(show, () => settings.key);
byId("key").addEventListener("change", () => watch.now());
