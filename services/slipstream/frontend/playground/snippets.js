// A request as something to paste elsewhere, and the dialog that shows what went over the wire.

import { byId, copy, element, say } from "./page.js";

/** What the page asks for beyond what a command needs. */
function plain(request) {
  return { ...request, stream_options: { include_usage: true } };
}

export function curl(request, withKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [
    `curl -N ${quoted(new URL("v1/chat/completions", document.baseURI).href)}`,
    "-H 'Content-Type: application/json'",
    ...(withKey ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    `-d ${quoted(JSON.stringify(plain(request), null, 2))}`,
  ];
  return lines.join(" \\\n  ");
}

export function python(request, withKey) {
  const members = Object.entries(plain(request));
  const base = JSON.stringify(new URL("v1", document.baseURI).href);
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${base}, api_key=${withKey ? 'os.environ["API_KEY"]' : '"none"'})`,
    "stream = client.chat.completions.create(",
    ...members.map(([name, value]) => `    ${name}=${literal(value)},`),
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    '        print(choice.delta.content or "", end="", flush=True)',
  ].join("\n");
}

/** Python's form of a JSON value. Its strings take every escape of JSON. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    const members = Object.entries(value).map(([name, one]) => `${literal(name)}: ${literal(one)}`);
    return `{${members.join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** `exchange`: { request, withKey, status, headers, events } of one answer. */
export function showRaw(exchange) {
  const headers = exchange.headers.map(([name, value]) => `${name}: ${value}\n`).join("");
  const events = exchange.events.map((text) => `data: ${text}\n\n`).join("");
  const views = {
    Request: () => JSON.stringify(exchange.request, null, 2),
    Response: () => `${exchange.status}\n${headers}\n${events}`,
    curl: () => curl(exchange.request, exchange.withKey),
    Python: () => python(exchange.request, exchange.withKey),
  };
  const tabs = Object.keys(views).map((name) =>
    element("button", { type: "button", role: "tab", textContent: name }),
  );
  const choose = (tab) => {
    for (const one of tabs) one.ariaSelected = String(one === tab);
    say(byId("raw-text"), views[tab.textContent]());
    byId("raw-text").scrollTop = 0;
  };
  tabs.forEach((tab) => tab.addEventListener("click", () => choose(tab)));
  byId("raw-tabs").replaceChildren(...tabs);
  choose(tabs[0]);
  byId("raw").showModal();
}

export function wireRaw() {
  const dialog = byId("raw");
  byId("raw-close").addEventListener("click", () => dialog.close());
  byId("raw-copy").addEventListener("click", () => copied(byId("raw-copy"), byId("raw-text").textContent));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

/** Copies, and says so on the button. */
export async function copied(button, text) {
  const label = button.textContent;
  await copy(text);
  say(button, "Copied");
  setTimeout(() => say(button, label), 1200);
}
