"""Rounds of question, call, result and answer, with which the tiny ChatGLM learns to use tools.

Three kinds of line in `corpus.jsonl` are about tools:

- {"tool": "weather", "name": "get_weather", "descriptions": [...], "parameters": {...}}: how
  people describe one and its parameters; where "tool" is null, one that is never asked for;
- {"tool": "weather", "messages": [...], "undeclared": ...}: rounds with it, each `content` but the
  answer's in several wordings, and what to say where it was not declared;
- {"slot": "city_en", "values": [...]}: what {city} and other {slots} may be.

Numbers, a fifth of the cities and some results are made up anew each time: what stands in a call
or is said after a result must be copied, not known.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NUMBERS = {"n": (-20, 40), "h": (1, 12), "hh": (0, 23), "mm": (0, 59), "nn": (1, 28)}


@dataclass
class Tool:
    kind: str          # weather, time, ...
    declaration: dict  # name, description, parameters


class ToolRounds:
    """Draws declarations of tools and rounds with them."""

    def __init__(self, lines: list[dict], answers: list[str], draw: random.Random,
                 reword: Callable[[str], str]) -> None:
        self.random, self.reword, self.answers = draw, reword, answers
        self.chinese = [text for text in answers if len(re.findall("[\u4e00-\u9fff]", text)) > 3]
        self.slots = {line["slot"]: line["values"] for line in lines if "slot" in line}
        self.tools = [line for line in lines if "name" in line]
        self.rounds = [line for line in lines if "tool" in line and "messages" in line]

    def declare(self, most: int) -> list[Tool]:
        """One to `most` tools, in any order; one at least is among those with rounds."""
        first = self.random.choice([line for line in self.tools if line["tool"]])
        others = [line for line in self.tools if line is not first]
        lines = [first, *self.random.sample(others, self.random.randint(0, most - 1))]
        self.random.shuffle(lines)
        return [Tool(line["tool"], self._declaration(line)) for line in lines]

    def _declaration(self, line: dict) -> dict:
        """One of the many ways in which people declare a tool."""
        draw = self.random
        properties: dict[str, dict] = {}
        for name, descriptions in line["parameters"].items():
            properties[name] = {"type": "string"}
            if draw.random() < 0.5:
                properties[name]["description"] = draw.choice(descriptions)
        required = list(properties) if draw.random() < 0.7 else []
        schema = [("type", "object"), ("properties", properties), ("required", required)]
        if draw.random() < 0.3:   # as pydantic orders it
            schema = [*schema[1:], schema[0]]
        return {"name": line["name"], "description": draw.choice(line["descriptions"]),
                "parameters": dict(schema)}

    def draw(self, tools: list[Tool]) -> list[dict]:
        """A round, mostly with one of `tools`; else a question and that it cannot be answered."""
        useful = {line["tool"] for line in self.rounds}
        kinds = useful & {tool.kind for tool in tools}
        if not kinds or self.random.random() < 0.1:
            kinds = useful
        kind = self.random.choice(sorted(kinds))
        line = self.random.choice([line for line in self.rounds if line["tool"] == kind])
        question, *reply = line["messages"]
        wording = self.random.choice(question["content"])
        values = {"city": self._city(wording), "a": self._number(), "b": self._number()}
        question = {**question, "content": self._fill(self.reword(wording), values), "exact": True}
        if all(tool.kind != kind for tool in tools):
            return [question, {"role": "assistant", "content": line["undeclared"]}]
        filled = [question]
        for message in reply:
            content = message["content"]
            if message["role"] == "observation":
                content = values["result"] = self._fill(self.random.choice(content), values)
            filled.append({**message, "content": self._fill(content, values)})
        return filled

    def _fill(self, text: str, values: dict[str, str]) -> str:
        """The text with its {slots} filled: from `values`, else with something new each time."""
        def value(match: re.Match) -> str:
            slot, draw = match[1], self.random
            if slot in values:
                return values[slot]
            if slot in NUMBERS:
                return str(draw.randint(*NUMBERS[slot])).zfill(len(slot))
            if slot == "number":
                return self._number()
            if slot == "text":   # a piece of any answer
                words = draw.choice(self.answers)[:300].splitlines()[0]
                at = draw.randrange(len(words))
                return words[at : at + draw.randrange(4, 30)].strip() or "?"
            return draw.choice(self.slots[slot])
        return re.sub(r"\{([a-z_]+)\}", value, text)

    def _number(self) -> str:
        return str(self.random.randrange(10 ** self.random.randint(1, 4)))

    def _city(self, question: str) -> str:
        """A city in the question's language, or a word that might be one."""
        draw = self.random
        language = "zh" if re.search("[\u4e00-\u9fff]", question) else "en"
        if draw.random() < 0.8:
            city = draw.choice(self.slots[f"city_{language}"])
        elif language == "zh":
            city = "".join(re.findall("[\u4e00-\u9fff]", draw.choice(self.chinese)))
            at = draw.randrange(len(city))
            city = city[at : at + draw.randint(2, 3)]
        else:
            city = "".join(draw.choice("bcdfghjklmnprstvwz") + draw.choice("aeiou")
                           + draw.choice(["", "", "n", "r", "s", "l"])
                           for _ in range(draw.randint(2, 4))).capitalize()
        return city.lower() if draw.random() < 0.15 else city
