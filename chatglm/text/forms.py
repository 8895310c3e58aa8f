"""Answers that must have a form: JSON, JSON of a schema, or a tool's call, written as grammars.

The grammars are in llguidance's variant of Lark:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

from chatglm.errors import InvalidField

if TYPE_CHECKING:
    from chatglm.text.tokenizer import Tokenizer

# Limits that real schemas do not meet. Without them, building a grammar could take minutes.
MAX_SCHEMA = 2**15  # characters
MAX_VALUE = 2000  # characters
MAX_MULTIPLE = 100  # multipleOf counts digits with so many states
WHITESPACE = r"[ \n\t]{0,20}"  # between two things in JSON; a model must not go on with it for ever
SPACE = r"/[ \n]{1,2}/"  # some models write it first
# A Python string as a model writes it, for an argument that may be any text.
PYTHON_STRING = r"""/'([^'\\\x00-\x1f\x7f]|\\['"\\nt])*'/"""
SCHEMAS_INSIDE = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
BESIDE_REF = set(
    "$ref $defs definitions $schema $id $comment title description default examples deprecated "
    "readOnly writeOnly".split()
)
VALUES_INSIDE = ("const", "enum", "default", "examples", "example")  # not schemas


@dataclass(frozen=True)
class JsonForm:
    """JSON of a schema. `field` is the request's, for refusals. Keywords that cannot be kept are
    refused if it is `strict`, else ignored."""

    schema: dict[str, Any]
    field: str
    strict: bool = False

    def prefix(self, tokenizer: Tokenizer) -> str:
        """The text with which every such answer begins."""
        return "\n" if tokenizer.has_metadata else ""

    def grammar(self, tokenizer: Tokenizer) -> str:
        return f"start: {SPACE}? json\njson: {self.rule()}\n"

    def rule(self) -> str:
        return json_rule(self.schema, self.field, self.strict)


@dataclass(frozen=True)
class CallableTool:
    """A tool that the model may call, or must."""

    name: str
    schema: dict[str, Any]  # of its arguments, a JSON object
    field: str
    strict: bool = False


@dataclass(frozen=True)
class CallForm:
    """A call of one of the tools. If none is `required`, words will do, or JSON of a form."""

    tools: list[CallableTool]
    required: bool = True
    otherwise: JsonForm | None = None

    @property
    def field(self) -> str:
        return self.tools[0].field

    def prefix(self, tokenizer: Tokenizer) -> str:
        return self.tools[0].name + "\n" if self.required and len(self.tools) == 1 else ""

    def grammar(self, tokenizer: Tokenizer) -> str:
        """The name, a line end, the arguments: as a call in Python, which ChatGLM3 was taught, or
        as a JSON object."""
        rules, length = [], 0
        for i, tool in enumerate(self.tools):
            length += len(json.dumps(tool.schema))
            if length > 4 * MAX_SCHEMA:
                raise InvalidField("tools", f"have schemas of over {4 * MAX_SCHEMA} characters")
            # The name and the line end are one word of the grammar: WORDS must not match it.
            # A space may come before it: SentencePiece adds one at the beginning of a text.
            name = "" if self.prefix(tokenizer) else rf"/ ?{escaped(tool.name)}\n/"
            schema = {"type": "object", **tool.schema}
            written = python_call(i, schema, tool) if tokenizer.chat_format == "chatglm3" else ""
            written = written or f"call{i}: {json_rule(schema, tool.field, tool.strict)}\n"
            rules.append(f"tool{i}: {name} {SPACE}? call{i}\n{written}")
        start = [f"tool{i}" for i in range(len(self.tools))]
        if self.otherwise:
            start.append("json")
            begin = json.dumps(self.otherwise.prefix(tokenizer))
            rules.append(f"json: {begin} {SPACE}? value\nvalue: {self.otherwise.rule()}")
        elif not self.required:
            names = "|".join(escaped(tool.name) for tool in self.tools)
            start.append("WORDS")
            rules.append(rf"WORDS: /(?s:.*)/ & ~/\s*({names})\s*\n(?s:.*)/")
        return "\n".join([f"start: {' | '.join(start)}", *rules]) + "\n"


AnswerForm = JsonForm | CallForm


def escaped(name: str) -> str:
    """For a regular expression between slashes."""
    return re.escape(name).replace("/", r"\/")


def json_rule(schema: dict[str, Any], field: str, strict: bool) -> str:
    """A schema as a grammar has it. Raises InvalidField for what takes too long to understand."""
    for part in schemas_in(schema):
        values = [part.get("pattern"), part.get("const"), *listed(part.get("enum"))]
        values += dict_of(part.get("patternProperties"))  # its keys
        if any(len(json.dumps(value)) > MAX_VALUE for value in values):
            raise InvalidField(field, f"has a value of more than {MAX_VALUE} characters")
        merged, multiple = part.get("allOf"), cast(Any, part.get("multipleOf"))
        if isinstance(merged, list) and len(merged) > 1:
            raise InvalidField(field, "has allOf with several schemas; write them as one")
        if "$ref" in part and not part.keys() <= BESIDE_REF:
            raise InvalidField(field, 'has other keywords beside "$ref"; write them as one schema')
        if type(multiple) in (int, float) and len_of_multiple(multiple) > MAX_MULTIPLE:
            raise InvalidField(field, f"has multipleOf {multiple}; leave it out")
    options = {"whitespace_pattern": WHITESPACE} | (
        {} if strict else {"lenient": True, "coerce_one_of": True}
    )
    written = json.dumps({**without_more(schema), "x-guidance": options})
    if len(written) > MAX_SCHEMA:
        raise InvalidField(field, f"is longer than {MAX_SCHEMA} characters")
    return f"%json {written}"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def dict_of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema, and every schema in it."""
    if isinstance(schema, list):
        for item in schema:
            yield from schemas_in(item)
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in SCHEMAS_INSIDE and isinstance(value, dict):
            yield from schemas_in(list(value.values()))
        elif key not in VALUES_INSIDE:
            yield from schemas_in(value)


def without_more(schema: Any) -> Any:
    """The schema without properties that it does not list, where it does not speak of them: a model
    would make some up."""
    schema = json.loads(json.dumps(schema))  # a copy in which no two parts are one object
    for part in schemas_in(schema):
        if (
            part.get("type") == "object"
            and "properties" in part
            and "patternProperties" not in part
        ):
            part.setdefault("additionalProperties", False)
    return schema


def len_of_multiple(multiple: float) -> float:
    """The digits that count, as a number: of 0.25 it is 25."""
    digits = Decimal(str(multiple)).normalize().as_tuple().digits
    return float("".join(map(str, digits)))


def python_call(number: int, schema: dict[str, Any], tool: CallableTool) -> str:
    """The rules of ```python\\ntool_call(city='Paris')\\n```, or "" where a schema is not a plain
    list of arguments. They come in the schema's order."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    rest = {"type", "properties", "required", "title", "description", "$defs"} | (
        {"additionalProperties"} if schema.get("additionalProperties") is False else set()
    )
    if schema.keys() - rest or not isinstance(properties, dict) or not isinstance(required, list):
        return ""
    if not all(name.isidentifier() for name in properties):
        return ""
    if not all(isinstance(name, str) and name in properties for name in required):
        return ""
    if not all(isinstance(each, dict) for each in properties.values()):
        return ""
    shared = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    if len(json.dumps(shared)) * len(properties) > MAX_SCHEMA:  # each argument would repeat them
        return ""
    lines = [f'call{number}: "```python\\ntool_call(" first{number}x0 ")\\n```"']
    for i, (name, each) in enumerate(properties.items()):
        at = f"{number}x{i}"
        plain = each.keys() <= {"type", "title", "description", "default"}
        is_text = plain and each.get("type") == "string"
        value = PYTHON_STRING if is_text else json_rule({**shared, **each}, tool.field, tool.strict)
        argument, after = f'"{name}=" value{at}', f"rest{number}x{i + 1}"
        lines.append(f"value{at}: {value}")
        # Before the first argument there is no comma, and an optional one may be left out.
        optional = name not in required
        lines.append(f"first{at}: {argument} {after}" + f" | first{number}x{i + 1}" * optional)
        lines.append(f'rest{at}: ", " {argument} {after}' + f" | {after}" * optional)
    last = f"{number}x{len(properties)}"
    return "\n".join([*lines, f'first{last}: ""', f'rest{last}: ""']) + "\n"
