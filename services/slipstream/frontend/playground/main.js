// Puts the page together.

import { Chat, offerSamples } from "./chat.js";
import { Watch } from "./cluster.js";
import { byId, say } from "./page.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";
import { wireRaw } from "./snippets.js";

const chat = new Chat(new Settings());
const panel = new Panel();

function show(seen) {
  const { cluster, error } = seen;
  const state = error ? "gone" : cluster.draining ? "draining" : cluster.ready ? "ready" : "waiting";
  byId("ready").dataset.state = state;
  byId("ready").title = error ? String(error.message) : cluster.reason;
  say(byId("ready"), { gone: "no answer", draining: "stopping", ready: "ready", waiting: "not ready" }[state]);
  if (error) return;
  say(byId("model"), cluster.model);
  chat.serve(cluster.model, cluster.max_model_len);
  panel.show(seen);
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
if (matchMedia("(max-width: 760px)").matches) byId("cluster-fold").open = false;
offerSamples();
wireRaw();
document.addEventListener("keydown", keys);
byId("new-chat").addEventListener("click", () => chat.forget());
new Watch(show);
