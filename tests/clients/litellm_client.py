"""LiteLLM, which gateways are made of: plain, streamed, with a tool, with a schema."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks no other server for its prices

import litellm
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def ask(question, **more):
    return litellm.completion(
        model="openai/chatglm",
        api_base=sys.argv[1] + "/v1",
        api_key="none",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        **more,
    )


parameters = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
weather = {"name": "get_weather", "description": "The weather in a city", "parameters": parameters}
whole = ask("什么是 HTTP？").choices[0]
parts = [part.choices[0].delta.content or "" for part in ask("什么是 HTTP？", stream=True)]
tools = [{"type": "function", "function": weather}]
called = ask("上海今天天气怎么样？", tools=tools).choices[0].message.tool_calls[0].function
text = litellm.text_completion(
    model="text-completion-openai/chatglm",
    api_base=sys.argv[1] + "/v1",
    api_key="none",
    prompt="1, 2, 3,",
    max_tokens=8,
    temperature=0,
)
formed = ask("Who are you?", response_format=Person, max_tokens=200).choices[0].message.content
print(
    json.dumps(
        {
            "whole": whole.message.content,
            "finish_reason": whole.finish_reason,
            "streamed": "".join(parts),
            "called": [called.name, json.loads(called.arguments)],
            "text": text.choices[0].text,
            "formed": Person.model_validate_json(formed).model_dump(),
        }
    )
)
