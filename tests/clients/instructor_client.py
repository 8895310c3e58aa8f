"""instructor, as its own documentation begins: a pydantic model comes back."""

import json
import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    unit: Literal["celsius", "fahrenheit"]
    days: list[bool]


client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
question = [{"role": "user", "content": "What is the weather in Paris?"}]
got = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    answer = instructor.from_openai(client, mode=mode).chat.completions.create(
        model="chatglm",
        response_model=Weather,
        messages=question,
        max_retries=0,
        max_tokens=400,
        seed=1,
    )
    assert isinstance(answer, Weather)
    got[mode.name] = answer.model_dump()
print(json.dumps(got))
