// The npm package `openai`: chat, streams, tools, responses, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { baseURL, checkWeather, city, hi, model, weather } from "./common.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", timeout: 120_000 });
const quick = { model, max_tokens: 12, temperature: 0 };

const whole = await client.chat.completions.create({ ...quick, messages: hi });
let text = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...quick,
  messages: hi,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
console.log("chat ok");

const forced = { tools: weather, tool_choice: "required", parallel_tool_calls: false };
const runner = client.chat.completions.stream({
  ...quick, ...forced, max_tokens: 80, messages: city,
});
const called = await runner.finalChatCompletion();
assert.equal(called.choices[0].finish_reason, "tool_calls");
checkWeather(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments));
console.log("tools ok");

const first = await client.responses.create({
  model, max_output_tokens: 12, temperature: 0, input: "Hi",
});
let said = "";
const events = await client.responses.create({
  model, max_output_tokens: 12, temperature: 0, input: "Hi", stream: true,
});
for await (const event of events) {
  if (event.type === "response.output_text.delta") said += event.delta;
}
assert.equal(said, first.output_text);
console.log("responses ok");

await assert.rejects(
  client.chat.completions.create({ ...quick, messages: hi, temperature: 3 }),
  (error) => error instanceof OpenAI.BadRequestError && error.code === "decimal_above_max_value",
);
console.log("errors ok");
