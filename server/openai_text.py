"""What a request to `/v1/completions` may hold: a text that the model goes on with.

Format: https://platform.openai.com/docs/api-reference/completions/create
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from chatglm import InvalidField
from server.bodies import Prompt, one_of
from server.openai_fields import CHAT_ONLY, NOT_SET, UNSUPPORTED
from server.openai_request import OpenAIRequest

MAX_ANSWERS = 64  # of one request
Text = Annotated[str, Field(min_length=1)]


class CompletionRequest(OpenAIRequest):
    """A text to go on with. The model sees no conversation, and no roles."""

    NOT_SET = {**NOT_SET, "logprobs": []}
    UNSUPPORTED = {**UNSUPPORTED, **CHAT_ONLY}
    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "从前有座山，", "max_tokens": 40}}
    )
    prompt: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_ANSWERS, fail_fast=True)],
        one_of("a text or a list of texts, none of them empty (token ids are not supported)"),
    ] = Field(description="a text, or several: each is gone on with")
    max_tokens: int = Field(16, ge=1, description="tokens of the answer")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="tell how likely each token was, and so many others"
    )

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[Prompt]:
        self.refuse_unsupported()
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(texts) * self.n > MAX_ANSWERS:
            raise InvalidField("n", f"must not ask for over {MAX_ANSWERS} answers in all")
        return list(texts)
