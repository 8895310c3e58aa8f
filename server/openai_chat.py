"""What a request to `/v1/chat/completions` may hold, and what it means to the engine.

Format: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from chatglm import InvalidField
from chatglm.errors import preview
from chatglm.text.forms import AnswerForm, CallableTool, CallForm
from chatglm.text.tools import declare, write_call
from server.bodies import Prompt, StrictModel, one_of
from server.openai_forms import FunctionCall, NamedToolChoice, ResponseFormat, Tool, ToolChoice
from server.openai_request import OpenAIRequest
from server.parsing import check_values, parse

ROLES = {"developer": "system", "tool": "observation", "function": "observation"}  # our names

# Limits that real requests do not meet. The first entry that is wrong is refused (fail_fast): an
# error for each of 300,000 would take seconds.
MESSAGES = Field(min_length=1, max_length=20_000, fail_fast=True)
PARTS = Field(max_length=1000, fail_fast=True)
TOOLS = Field(max_length=1000, fail_fast=True)


class ContentPart(StrictModel):
    type: Literal["text"]
    text: str


class OtherPart(StrictModel):
    """Known only to be refused as what it is."""

    type: Literal["image_url", "input_image", "input_audio", "audio_url", "video_url", "file"]


Content = Annotated[
    str | Annotated[list[ContentPart | OtherPart], PARTS] | None,
    one_of('a string or a list of {"type": "text", "text": …} parts'),
]


class MessageToolCall(StrictModel):
    function: FunctionCall


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    tool_calls: Annotated[list[MessageToolCall], TOOLS] | None = None
    function_call: FunctionCall | None = Field(None, description="a call, in its older form")

    def to_messages(self, where: str) -> list[dict]:
        """As the tokenizer takes them: what is said, then each call. Raises InvalidField."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(text_of(part, f"{where}.content") for part in content)
        functions = {
            f"{where}.tool_calls.{i}.function": call.function
            for i, call in enumerate(self.tool_calls or [])
        }
        if self.function_call:
            functions[f"{where}.function_call"] = self.function_call
        calls = [
            write_call(function.name, read_arguments(function.arguments, place))
            for place, function in functions.items()
        ]
        if calls and not content:
            return calls
        return [{"role": ROLES.get(self.role, self.role), "content": content}, *calls]


def text_of(part: ContentPart | OtherPart, where: str) -> str:
    if isinstance(part, OtherPart):
        raise InvalidField(where, f"has a part of type {part.type!r}; this model reads text alone")
    return part.text


class ChatCompletionRequest(OpenAIRequest):
    """A conversation to go on with."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "chatglm", "messages": [{"role": "user", "content": "你好"}]}
        },
    )
    messages: Annotated[list[Message], MESSAGES] = Field(
        description="if the last one is the assistant's, it is continued"
    )
    max_tokens: int | None = Field(None, ge=1, description="tokens of the answer")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same, newer name")
    logprobs: bool = Field(False, description="tell how likely each token was")
    top_logprobs: int = Field(0, ge=0, le=20, description="and so many others in its place")
    tools: Annotated[list[Tool], TOOLS] = []
    tool_choice: ToolChoice = "auto"
    response_format: ResponseFormat = ResponseFormat(type="text")

    @property
    def most_tokens(self) -> int | None:
        limits = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return min(limits, default=None)

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self) -> list[Prompt]:
        return [self.to_messages()]

    def to_messages(self) -> list[dict]:
        self.refuse_unsupported()
        messages: list[dict] = []
        for i, message in enumerate(self.messages):
            messages += message.to_messages(f"messages.{i}")
        self.check_last(messages)
        names = set(self.callable_names())
        tools = [tool.function.declaration() for tool in self.tools if tool.function.name in names]
        return declare(messages, tools) if tools else messages

    def check_last(self, messages: list[dict]) -> None:
        """An answer that is begun is continued. One without text is none: some programs send it."""
        if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()
        if messages[-1]["role"] != "assistant":
            return
        if "metadata" in messages[-1]:
            raise InvalidField("messages", "must not end with a call; add the tool's result")
        if len(messages) == 1 or not messages[-1]["content"]:
            raise InvalidField("messages", "must have one that is not the assistant's")
        if self.is_forced:
            raise InvalidField("tool_choice", "cannot force a call where the answer has begun")

    @property
    def is_forced(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

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
        if self.tool_choice == "required" and not names:
            raise InvalidField("tool_choice", "'required' needs tools")
        return names

    def form(self) -> AnswerForm | None:
        """What has no form asked for is left to the model: words, or a call as it writes one."""
        names, json_form = set(self.callable_names()), self.response_format.form()
        tools = [
            CallableTool(
                tool.function.name,
                tool.function.parameters,
                f"tools.{i}.function.parameters",
                tool.function.strict,
            )
            for i, tool in enumerate(self.tools)
            if tool.function.name in names
        ]
        if self.is_forced:
            return CallForm(tools)
        if tools and (json_form or any(tool.strict for tool in tools)):
            return CallForm(tools, required=False, otherwise=json_form)
        return json_form


def read_arguments(text: str, where: str) -> dict:
    field = f"{where}.arguments"
    arguments: object = None
    with suppress(ValueError):
        arguments = parse((text or "{}").encode())
    if not isinstance(arguments, dict):
        raise InvalidField(field, f"must be a JSON object, not {preview(text)}")
    check_values(field, arguments)  # JSON in a string of JSON: it has been checked as text only
    return arguments
