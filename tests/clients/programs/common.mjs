// What the programs ask for. Their server is in the environment.
import assert from "node:assert/strict";

export const baseURL = process.env.SLIPSTREAM_BASE_URL;
export const model = process.env.SLIPSTREAM_MODEL;
export const hi = [{ role: "user", content: "Say hello to the sea." }];
export const city = [{ role: "user", content: "What is the weather in Oslo?" }];
export const parameters = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Oslo", "Paris"] },
    days: { type: "integer", minimum: 1, maximum: 9 },
  },
  required: ["city", "days"],
  additionalProperties: false,
};
export const weather = [
  { type: "function", function: { name: "get_weather", description: "Weather.", parameters } },
];

export function checkWeather(given) {
  assert.deepEqual(Object.keys(given).sort(), ["city", "days"]);
  assert.ok(["Oslo", "Paris"].includes(given.city) && given.days >= 1 && given.days <= 9);
}
