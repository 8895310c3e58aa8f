"""What a request for one of OpenAI's chat completions may hold, and what it means to the engine.

Format: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from chatglm import InvalidField, SamplingParams
from chatglm.errors import preview
from chatglm.text.tools import declare, write_call
from server.bodies import (
    ChatBody,
    RepetitionPenalty,
    Seed,
    StrictModel,
    Temperature,
    TopP,
    one_of,
)
from server.parsing import check_values

ROLES = {"developer": "system", "tool": "observation", "function": "observation"}  # our names

# Limits that real requests do not meet. The first entry that is wrong is refused (fail_fast): an
# error for each of 300,000 would take seconds.
MESSAGES = Field(min_length=1, max_length=20_000, fail_fast=True)
PARTS = Field(max_length=1000, fail_fast=True)
TOOLS = Field(max_length=1000, fail_fast=True)
STOPS = Field(max_length=32, fail_fast=True)
Stop = Annotated[str, Field(max_length=500)]

# What would change the answer and is not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, list[Any]] = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "functions": [[]],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}


class ContentPart(StrictModel):
    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[ContentPart], PARTS] | None,
    one_of('a string or a list of {"type": "text", "text": …} parts'),
]


class FunctionCall(StrictModel):
    name: str
    arguments: str = Field("", description="a JSON object")


class MessageToolCall(StrictModel):
    function: FunctionCall


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    tool_calls: Annotated[list[MessageToolCall], TOOLS] | None = None

    def to_messages(self, where: str) -> list[dict]:
        """As the tokenizer takes them: what is said, then each call. Raises InvalidField."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        calls = [
            write_call(
                call.function.name,
                read_arguments(call.function.arguments, f"{where}.tool_calls.{i}.function"),
            )
            for i, call in enumerate(self.tool_calls or [])
        ]
        if calls and not content:
            return calls
        return [{"role": ROLES.get(self.role, self.role), "content": content}, *calls]


class FunctionDefinition(StrictModel):
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field({}, description="a JSON schema")


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: FunctionCall


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice,
    one_of('"none", "auto", "required" or {"type": "function", "function": {"name": …}}'),
]


StopSequences = Annotated[
    Stop | Annotated[list[Stop], STOPS], one_of("a string or a list of strings")
]


class StreamOptions(StrictModel):
    include_usage: bool = False


class ChatCompletionRequest(ChatBody):
    """A conversation to go on with. Fields that are not listed are ignored, but for those that
    would change the answer (n, logprobs, response_format, …): they are refused."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {"model": "chatglm", "messages": [{"role": "user", "content": "你好"}]}
        },
    )
    model: str = Field("", description="any name: the server has one model")
    messages: Annotated[list[Message], MESSAGES] = Field(
        description="the last one not the assistant's"
    )
    max_tokens: int | None = Field(None, ge=1, description="tokens of the answer")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same, newer name")
    top_p: TopP = 0.7
    temperature: Temperature = 0.95
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = None
    stop: StopSequences = Field([], description="texts that end the answer; not part of it")
    stream_options: StreamOptions = StreamOptions()
    tools: Annotated[list[Tool], TOOLS] = []
    tool_choice: ToolChoice = "auto"

    @classmethod
    def uses(cls, field: str) -> bool:
        return super().uses(field) or field in UNSUPPORTED

    def to_messages(self) -> list[dict]:
        for field, value in (self.model_extra or {}).items():
            if field in UNSUPPORTED and value not in UNSUPPORTED[field]:
                raise InvalidField(field, f"{preview(value)} is not supported; leave it out")
        if self.messages[-1].role == "assistant":
            raise InvalidField("messages", "must not end with the assistant's; add the user's")
        messages: list[dict] = []
        for i, message in enumerate(self.messages):
            messages += message.to_messages(f"messages.{i}")
        names = set(self.callable_names())
        tools = [tool.function.model_dump() for tool in self.tools if tool.function.name in names]
        return declare(messages, tools) if tools else messages

    def callable_names(self) -> list[str]:
        """The tools that the model may call. Raises InvalidField for one that is not declared."""
        names = [tool.function.name for tool in self.tools]
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedToolChoice):
            wanted = self.tool_choice.function.name
            if wanted not in names:
                raise InvalidField(
                    "tool_choice", f"names {preview(wanted)}, which is not among tools"
                )
            return [wanted]
        if self.tool_choice == "required" and len(names) != 1:
            raise InvalidField(
                "tool_choice", "'required' needs exactly one tool; name the function"
            )
        return names

    def sampling_params(self) -> SamplingParams:
        limits = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_new_tokens=min(limits, default=None),
        )

    def forced_prefix(self) -> str:
        """A forced tool call starts with the tool's name; the model writes the arguments."""
        forced = self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)
        return self.callable_names()[0] + "\n" if forced else ""


def read_arguments(text: str, where: str) -> dict:
    field = f"{where}.arguments"
    arguments: object = None
    with suppress(ValueError, RecursionError):
        arguments = json.loads(text or "{}")
    if not isinstance(arguments, dict):
        raise InvalidField(field, f"must be a JSON object, not {preview(text)}")
    check_values(field, arguments)  # JSON in a string of JSON: it has been checked as text only
    return arguments
