// OpenAI's own SDK for JavaScript: whole, streamed, aborted, with a tool, with a schema.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const ask = (content, more) => ({
  model: "chatglm",
  messages: [{ role: "user", content }],
  temperature: 0,
  ...more,
});
const create = (...request) => client.chat.completions.create(ask(...request));

const whole = (await create("什么是 HTTP？")).choices[0];

let streamed = "";
for await (const part of await create("什么是 HTTP？", { stream: true })) {
  streamed += part.choices[0].delta.content ?? "";
}

const endless = await create("从一数到一百", { stream: true });
for await (const part of endless) {
  if (part.choices[0].delta.content) break; // the SDK hangs up
}

const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
};
const description = "The weather in a city";
const tools = [{ type: "function", function: { name: "get_weather", description, parameters } }];
const [call] = (await create("上海今天天气怎么样？", { tools })).choices[0].message.tool_calls;

const schema = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};
const response_format = { type: "json_schema", json_schema: { name: "p", schema, strict: true } };
const formed = (await create("Who are you?", { response_format, max_tokens: 200 })).choices[0];

const prompt = { model: "chatglm", prompt: "1, 2, 3,", max_tokens: 8, temperature: 0 };
const text = (await client.completions.create(prompt)).choices[0].text;

let refused = "";
try {
  await create("hi", { temperature: 3 });
} catch (error) {
  refused = `${error.constructor.name} ${error.status} ${error.param}`;
}

console.log(
  JSON.stringify({
    whole: whole.message.content,
    finish_reason: whole.finish_reason,
    streamed,
    called: [call.function.name, JSON.parse(call.function.arguments)],
    formed: JSON.parse(formed.message.content),
    text,
    refused,
  }),
);
