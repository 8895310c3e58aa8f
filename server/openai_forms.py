"""`/v1`: tools, and the form that an answer must have, as a request says it.

Format: https://platform.openai.com/docs/guides/structured-outputs
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from chatglm import InvalidField
from chatglm.text.forms import JsonForm
from server.bodies import StrictModel, one_of


class FunctionCall(StrictModel):
    name: str
    arguments: str = Field("", description="a JSON object")


class FunctionDefinition(StrictModel):
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field({}, description="a JSON schema")
    strict: bool = Field(False, description="the arguments always fit the schema")

    def declaration(self) -> dict[str, Any]:
        """What the model is told of it."""
        return self.model_dump(exclude={"strict"})


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(StrictModel):
    model_config = ConfigDict(extra="allow")
    name: str = ""
    description: str = ""
    json_schema: dict[str, Any] = Field({}, alias="schema", description="a JSON schema")
    strict: bool = Field(False, description="refuse what cannot be kept of the schema")


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def form(self) -> JsonForm | None:
        """Raises InvalidField."""
        if self.type == "json_object":
            return JsonForm({"type": "object"}, "response_format")
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise InvalidField("response_format.json_schema", "is required")
        field = "response_format.json_schema.schema"
        if self.json_schema.model_extra and "json_schema" not in self.json_schema.model_fields_set:
            raise InvalidField(field, "is required: the schema belongs there")
        return JsonForm(self.json_schema.json_schema, field, self.json_schema.strict)


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: FunctionCall


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice,
    one_of('"none", "auto", "required" or {"type": "function", "function": {"name": …}}'),
]
