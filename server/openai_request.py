"""What the requests for chat completions and for completions have in common: how the next token is
chosen, and when an answer ends.

Format: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from chatglm import InvalidField, SamplingParams
from chatglm.errors import preview
from server.bodies import (
    RepetitionPenalty,
    RequestBody,
    Seed,
    Stop,
    StrictModel,
    Temperature,
    TopP,
)
from server.openai_fields import ADVICE, IGNORED, NOT_SET, RENAMED, UNSUPPORTED, without_unset

MAX_BIASES = 1024

Penalty = Annotated[
    float, Field(ge=-2, le=2, description="over 0 discourages what the answer has already")
]


def check_number(biases: object) -> object:
    """pydantic counts the entries of an object only after it has looked at each."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} entries")
    return biases


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(check_number)
]


class StreamOptions(StrictModel):
    include_usage: bool = False


class OpenAIRequest(RequestBody):
    """Fields that are not listed are ignored, but for those that would change the answer: they are
    refused. -1, 0 and "" count as absent where they can mean nothing."""

    IGNORED = IGNORED
    UNSUPPORTED: ClassVar[Mapping[str, list[Any]]] = UNSUPPORTED
    NOT_SET: ClassVar[Mapping[str, list[Any]]] = NOT_SET
    model_config = ConfigDict(extra="allow")

    model: str = Field("", description="any name: the server has one model")
    top_p: TopP = 0.7
    temperature: Temperature = 0.95
    repetition_penalty: RepetitionPenalty = 1.0
    top_k: int = Field(0, ge=0, description="the k likeliest tokens alone; 0: all")
    min_p: float = Field(0.0, ge=0, le=1, description="no token less likely than this share")
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = Field({}, description="by token id: added to its score")
    n: int = Field(1, ge=1, le=16, description="answers")
    seed: Seed = None
    stop: Stop = []
    stream_options: StreamOptions = StreamOptions()

    @property
    def num_answers(self) -> int:
        return self.n

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """Of an answer; None: what the context has left."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many other tokens are told of in the place of each; None: no log-probabilities."""

    @model_validator(mode="before")
    @classmethod
    def drop_unset(cls, fields: object) -> object:
        if isinstance(fields, dict):
            fields = {RENAMED.get(name, name): value for name, value in fields.items()}
        return without_unset(fields, cls.NOT_SET)

    @classmethod
    def uses(cls, field: str) -> bool:
        return super().uses(field) or field in cls.UNSUPPORTED or field in RENAMED

    def refuse_unsupported(self) -> None:
        """Raises InvalidField for the first field that asks for what is not supported."""
        for field, value in (self.model_extra or {}).items():
            if value not in self.UNSUPPORTED[field]:
                advice = ADVICE.get(field, "leave it out")
                raise InvalidField(field, f"{preview(value)} is not supported; {advice}")

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            top_k=min(self.top_k, 2**31 - 1),  # all the same: no vocabulary is as large
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((token_id(key), bias) for key, bias in self.logit_bias.items()),
            logprobs=self.alternatives,
            seed=self.seed,
            max_visible_tokens=self.most_tokens,
        )


def token_id(key: str) -> int:
    if key.isascii() and key.isdecimal() and len(key) < 10:
        return int(key)
    raise InvalidField("logit_bias", f"must have token ids as its keys, not {preview(key)}")
