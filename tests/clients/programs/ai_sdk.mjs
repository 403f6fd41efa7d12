// Vercel's `ai` with `@ai-sdk/openai` (chat and responses) and `@ai-sdk/openai-compatible`.
import assert from "node:assert/strict";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { baseURL, checkWeather, model, parameters } from "./common.mjs";

const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "slipstream", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const models = {
  chat: openai.chat(model),
  responses: openai.responses(model),
  compatible: compatible(model),
};
const get_weather = tool({ description: "Weather.", inputSchema: jsonSchema(parameters) });

for (const [name, made] of Object.entries(models)) {
  const quick = { model: made, maxOutputTokens: 16, temperature: 0, maxRetries: 0 };
  const whole = await generateText({ ...quick, prompt: "Say hello to the sea." });
  assert.ok(whole.text && whole.usage.outputTokens <= 16);
  const streamed = streamText({ ...quick, prompt: "Say hello to the sea." });
  let text = "";
  for await (const piece of streamed.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);

  const long = { ...quick, maxOutputTokens: 90 };
  const called = streamText({
    ...long, prompt: "Weather in Oslo?", tools: { get_weather }, toolChoice: "required",
  });
  const calls = await called.toolCalls;
  assert.ok(calls.length >= 1);
  checkWeather(calls[0].input);
  const { object } = await generateObject({
    ...long, prompt: "Weather in Oslo?", schema: jsonSchema(parameters),
  });
  checkWeather(object);
  console.log(name, "ok");
}
