"""What the JSON of every request has in common: strict types, and errors that name the field."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from chatglm import InvalidField, SamplingParams
from chatglm.errors import preview
from chatglm.text.forms import AnswerForm
from server.parsing import check_values, parse


def greedy_if_tiny(temperature: float) -> float:
    """Many programs write 1e-6 for greedy. As a divisor it would make every score infinite."""
    return temperature if temperature >= COLDEST else 0.0


COLDEST = 0.01
# How the next token is chosen; the same in every protocol.
TopP = Annotated[float, Field(gt=0, le=1, description="nucleus sampling; 0 counts as absent")]
Temperature = Annotated[
    float,
    Field(ge=0, le=2, description=f"0 is greedy, and so is what is under {COLDEST}"),
    AfterValidator(greedy_if_tiny),
]
RepetitionPenalty = Annotated[
    float, Field(ge=0.5, le=2, description="over 1 discourages repetition")
]
History = Annotated[
    list,
    Field(max_length=20_000, description='[query, response] pairs, or {"role", "content"} dicts'),
]
Seed = Annotated[int | None, Field(ge=0, lt=2**32, description="makes an answer repeatable")]

LIMITS = {
    "too_long": "must have at most {max_length} entries",
    "string_too_long": "must have at most {max_length} characters each",
}
ZERO_IS_ABSENT = {"max_length", "top_p"}  # as in the textbook's `top_p or 0.7`
PROBLEMS = {  # what would do, by pydantic's error types; in braces, what pydantic knows of it
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be greater than or equal to {ge:g}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be less than or equal to {le:g}",
    "literal_error": "must be {expected}",
    "too_short": "must not be empty",
    **LIMITS,
    "string_pattern_mismatch": "must match {pattern}",
    "value_error": "{error}",
}


def problem(error: Mapping[str, Any]) -> str:
    """What is wrong with a field, from one of pydantic's errors."""
    wanted = PROBLEMS.get(error["type"], "must be as in /docs").format(**error.get("ctx", {}))
    if error["type"] in ("missing", "too_short", "too_long"):  # there is no value to show
        return wanted
    return f"{wanted}, not {preview(error['input'])}"


def one_of(forms: str) -> WrapValidator:
    """For a field of several types: one sentence, where pydantic has an error for each type."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                if each["type"] in ("too_long", "string_too_long"):
                    raise ValueError(LIMITS[each["type"]].format(**each["ctx"])) from error
            raise ValueError(f"must be {forms}") from error

    return WrapValidator(check)


Prompt = list[dict] | str  # messages, or a text to go on with
StopText = Annotated[str, Field(max_length=500)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=32, fail_fast=True)],
    one_of("a string or a list of strings"),
    Field(description="texts that end the answer; not part of it"),
]


class StrictModel(BaseModel):
    """Strict types: no coercion from strings or booleans, no NaN. Null counts as absent; other
    keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None and not (name in ZERO_IS_ABSENT and is_zero(value))
        }


def is_zero(value: object) -> bool:
    return type(value) in (int, float) and value == 0  # False is 0 as well, but no number here


class RequestBody(StrictModel):
    """The body of a request for an answer, in any protocol."""

    stream: bool = False
    IGNORED: ClassVar[frozenset[str]] = frozenset()  # what changes nothing; others are noticed
    _unknown_fields: list[str] = PrivateAttr(default_factory=list)

    @property
    def unknown_fields(self) -> list[str]:
        """What the request had besides."""
        return self._unknown_fields

    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """What is to be answered: one conversation, but for OpenAI's completions. Raises
        InvalidField."""

    @abstractmethod
    def sampling_params(self) -> SamplingParams: ...

    def form(self) -> AnswerForm | None:
        """What form the answer must have."""
        return None

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        stop = getattr(self, "stop", [])
        return [text for text in ([stop] if isinstance(stop, str) else stop) if text]

    @property
    def num_answers(self) -> int:
        """How many answers each prompt gets."""
        return 1

    @classmethod
    def uses(cls, field: str) -> bool:
        """Whether a field means anything here. Others are dropped unread, whatever they hold."""
        return field in cls.model_fields

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Raises ValueError if it is not JSON, InvalidField if a field is wrong."""
        return cls.from_fields(parse(body))

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        """From a URL's query, in which all but the prompt is JSON. Raises InvalidField."""
        fields: dict[str, Any] = dict(query)
        for name in fields.keys() - {"prompt"}:
            # Not JSON: leave the text; validation rejects it if the field needs another type.
            with suppress(ValueError, RecursionError):
                fields[name] = json.loads(fields[name])
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: object) -> Self:
        """From what was JSON. Raises ValueError, naming the first field that is wrong."""
        unknown: list[str] = []
        if isinstance(fields, dict):
            unknown = [name for name in fields if not cls.uses(name) and name not in cls.IGNORED]
            fields = {name: value for name, value in fields.items() if cls.uses(name)}
            for name, value in fields.items():
                check_values(name, value)
        try:
            body = cls.model_validate(fields)
        except ValidationError as errors:
            first = errors.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            if not field:
                raise ValueError(f"the body {problem(first)}") from errors
            raise InvalidField(field, problem(first)) from errors
        body._unknown_fields = unknown
        return body

    # For /docs: FastAPI sees nothing of a body that the route reads itself.

    @classmethod
    def openapi_body(cls) -> dict[str, Any]:
        content = {"application/json": {"schema": inlined_schema(cls)}}
        return {"requestBody": {"required": True, "content": content}}

    @classmethod
    def openapi_query(cls) -> dict[str, Any]:
        schema = inlined_schema(cls)
        return {
            "parameters": [
                {
                    "name": name,
                    "in": "query",
                    "required": name in schema["required"],
                    "schema": field,
                }
                for name, field in schema["properties"].items()
            ]
        }


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema in one piece: "#/$defs/…" leads nowhere in an OpenAPI document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].removeprefix("#/$defs/")
            beside = {key: value for key, value in node.items() if key != "$ref"}
            return inlined({**definitions[name], **beside})
        return {key: inlined(value) for key, value in node.items()}

    return inlined(schema)
