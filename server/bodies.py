"""What every request's JSON has in common: strict types, and errors that say what would do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chatglm.errors import preview

REASONS = {
    400: "what cannot be served, and why",
    401: "no key, or a wrong one",
    408: "the body came too slowly",
    413: "the body is too large",
    429: "too many wait: see Retry-After",
    503: "the model cannot answer",
}
ZERO_IS_ABSENT = {"max_length", "top_p"}  # as in the textbook's `top_p or 0.7`


class Strict(BaseModel):
    """A string is no number, nor is true or NaN; null counts as absent; other keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def leave_out_absent(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None
            and not (name in ZERO_IS_ABSENT and type(value) in (int, float) and value == 0)
        }

    @classmethod
    def read(cls, body: bytes | dict) -> Self:
        """From JSON, or from fields already read. Raises ValueError, naming the field."""
        try:
            fields = body if isinstance(body, dict) else json.loads(body.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
            raise ValueError(f"the body must be a JSON object, as in /docs: {error}") from error
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the body"
            wanted = re.sub("^Input should", "must", first["msg"]).replace("Field", "is")
            raise ValueError(f"{field} {wanted}, not {preview(first['input'])}") from error

    @classmethod
    def written_out_schema(cls) -> dict:
        """Its JSON schema in one piece: in an OpenAPI document, "#/$defs/…" would lead nowhere."""
        schema = cls.model_json_schema()
        definitions = schema.pop("$defs", {})

        def whole(node: Any) -> Any:
            if isinstance(node, list):
                return [whole(item) for item in node]
            if not isinstance(node, dict):
                return node
            node = {name: whole(item) for name, item in node.items()}
            named = node.pop("$ref", "").rpartition("/")[2]
            return {**whole(definitions[named]), **node} if named else node

        return whole(schema)

    @classmethod
    def described(cls, refusal: dict, answers: dict) -> dict[str, dict]:
        """For /docs, by method: what FastAPI cannot see of a route that reads its body itself.
        `answers` has an example for each media type."""
        schema = cls.written_out_schema()
        responses = {
            code: {"description": reason, "content": {"application/json": {"example": refusal}}}
            for code, reason in REASONS.items()
        }
        responses[200] = {
            "description": "the answer",
            "content": {media: {"example": example} for media, example in answers.items()},
        }
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        query = [
            {"name": name, "in": "query", "required": name in schema["required"], "schema": field}
            for name, field in schema["properties"].items()
        ]
        return {
            "post": {"openapi_extra": {"requestBody": body}, "responses": responses},
            "get": {"openapi_extra": {"parameters": query}, "responses": responses},
        }

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        """From a URL's query, where all but the prompt is JSON. Raises ValueError."""
        fields: dict = dict(query)
        for name in fields.keys() - {"prompt"}:
            with suppress(ValueError, RecursionError):  # what is not JSON stays text, and is
                fields[name] = json.loads(fields[name])  # refused as such where it counts
        return cls.read(fields)


class Sampling(Strict):
    """How the next token is chosen."""

    top_p: float = Field(0.7, gt=0, le=1, description="nucleus sampling; 0 is absent")
    temperature: float = Field(0.95, ge=0, le=2, description="0 is greedy")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="over 1 discourages repetition")
    seed: int | None = Field(None, ge=0, lt=2**32, description="makes an answer repeatable")

    def sampling(self) -> dict:
        """As `Engine.prepare` takes it."""
        return self.model_dump(include=set(Sampling.model_fields))
