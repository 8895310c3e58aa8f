"""LlamaIndex's OpenAILike: a chat, a stream, a completion, a tool, an object of a class."""

import json
import sys

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather in a city"""
    return f"{city}: 25"


llm = OpenAILike(
    model="chatglm",
    api_base=sys.argv[1] + "/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=2048,
    temperature=0,
    max_tokens=300,
)
asked = [ChatMessage(role="user", content="什么是 HTTP？")]
streamed = ""
for part in llm.stream_chat(asked):
    streamed += part.delta or ""
tool = FunctionTool.from_defaults(get_weather)
result = llm.predict_and_call([tool], user_msg="上海今天天气怎么样？")
person = llm.as_structured_llm(Person).chat([ChatMessage(role="user", content="Who are you?")])
print(
    json.dumps(
        {
            "whole": llm.chat(asked).message.content,
            "streamed": streamed,
            "completed": llm.complete("什么是 HTTP？").text,
            "called": str(result),
            "formed": person.raw.model_dump(),
        }
    )
)
