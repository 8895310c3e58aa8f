"""Training rounds with tools: question, call, result, answer.

Three kinds of line in `corpus.jsonl` are about tools:

- {"tool": "weather", "name": "get_weather", "descriptions": [...], "parameters": {...}} declares a
  tool in several ways. If "tool" is null, no question asks for it.
- {"tool": "weather", "messages": [...], "undeclared": ...} is a round. Each `content` but the
  answer's has several wordings. "undeclared" is the answer where the tool was not declared.
- {"slot": "city_en", "values": [...]} lists the values of {city} and other {slots}.

Numbers, many cities and most results are made up each time. So the model must copy them into a
call or an answer; it cannot know them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

KNOWN = 0.6  # share of cities that are in the corpus
MADE_UP = 0.6  # share of results that no real tool would return
QUOTED = 0.4  # share of these that are a piece of an answer of the corpus, if they are not JSON
ROUND = 0.3  # share of numbers that end in zeros
ALL = 0.6  # share of declarations with all tools that have rounds, if that many are allowed
BRIEF = 0.4  # share of tools that are declared without parameters
NUMBERS = {"n": (-20, 40), "h": (1, 12), "hh": (0, 23), "mm": (0, 59), "nn": (1, 28)}


@dataclass
class Tool:
    kind: str  # weather, time, ...
    declaration: dict  # name, description, parameters


class ToolRounds:
    """Draws declarations of tools and rounds with them."""

    def __init__(
        self,
        lines: list[dict],
        answers: list[str],
        draw: random.Random,
        reword: Callable[[str], str],
    ) -> None:
        self.random, self.reword = draw, reword
        self.answers = answers
        self.latin = re.findall(
            "[A-Za-z]+", " ".join(answers)
        )  # frequent words are drawn more often
        self.chinese = "".join(re.findall("[\u4e00-\u9fff]", "".join(answers)))
        self.slots = {line["slot"]: line["values"] for line in lines if "slot" in line}
        self.tools = [line for line in lines if "name" in line]
        self.rounds = [line for line in lines if "tool" in line and "messages" in line]

    def declare(self, most: int) -> list[Tool]:
        """One to `most` tools, in any order. At least one of them has rounds."""
        useful = [line for line in self.tools if line["tool"]]
        if most > len(useful) and self.random.random() < ALL:
            lines = useful
        else:
            first = self.random.choice(useful)
            others = [line for line in self.tools if line is not first]
            lines = [first, *self.random.sample(others, self.random.randint(0, most - 1))]
        self.random.shuffle(lines)
        return [Tool(line["tool"], self._declaration(line)) for line in lines]

    def _declaration(self, line: dict) -> dict:
        """A declaration of the tool, in one of many ways."""
        draw = self.random
        short = {"name": line["name"], "description": draw.choice(line["descriptions"])}
        if draw.random() < BRIEF:
            return short
        properties: dict[str, dict] = {}
        for name, descriptions in line["parameters"].items():
            properties[name] = {"type": "string"}
            if draw.random() < 0.5:
                properties[name]["description"] = draw.choice(descriptions)
        required = list(properties) if draw.random() < 0.7 else []
        schema = [("type", "object"), ("properties", properties), ("required", required)]
        if draw.random() < 0.3:  # as pydantic orders it
            schema = [*schema[1:], schema[0]]
        return {**short, "parameters": dict(schema)}

    def draw(self, tools: list[Tool], given: bool = False) -> list[dict]:
        """A round, mostly with one of `tools`. A question for another tool is answered by saying
        that it cannot be. With `given`, any tool is called, declared or not."""
        useful = {line["tool"] for line in self.rounds}
        kinds = useful & {tool.kind for tool in tools}
        if not kinds or self.random.random() < 0.1:
            kinds = useful
        lines = [line for line in self.rounds if line["tool"] in kinds]
        [line] = self.random.choices(lines, [len(line["messages"][0]["content"]) for line in lines])
        question, *reply = line["messages"]
        wording = self.random.choice(question["content"])
        values = {"city": self._city(wording), **self._operands()}
        question = {
            **question,
            "content": self._fill(self.reword(wording), values),
            "exact": " ".join(values.values()),
        }
        if not given and all(tool.kind != line["tool"] for tool in tools):
            return [question, {"role": "assistant", "content": line["undeclared"]}]
        filled = [question]
        for message in reply:
            content = message["content"]
            if message["role"] == "observation":
                content = values["result"] = self._result(content, values)
            extra = {"given": True} if given and "metadata" in message else {}
            filled.append({**message, "content": self._fill(content, values), **extra})
        return filled

    def _result(self, contents: list[str], values: dict[str, str]) -> str:
        draw = self.random
        if draw.random() >= MADE_UP:
            return self._fill(draw.choice(contents), values)
        word = draw.choice([self._latin, self._chinese])

        def value() -> str:
            return draw.choice(
                [
                    word,
                    word,
                    self._number,
                    lambda: self._fill("{hh}:{mm}", {}),
                    lambda: f"{draw.randint(-40, 400) / 10}",
                ]
            )()

        if draw.random() < 0.4:
            fields = {
                word(): draw.choice([value(), draw.randint(-40, 4000), draw.random() < 0.5])
                for _ in range(draw.randint(1, 3))
            }
            return json.dumps(
                fields, ensure_ascii=False, separators=draw.choice([(", ", ": "), (",", ":")])
            )
        if draw.random() < QUOTED:
            text = draw.choice(self.answers)
            words = re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+\s?", text)
            start = draw.randrange(len(words))
            return "".join(words[start : start + draw.randint(2, 10)]).strip()
        text = value()
        for _ in range(draw.randrange(6)):
            text += draw.choice([" ", " ", " ", ", ", "，", "-", ". "]) + value()
        return text + draw.choice(["", "", ".", "。"])

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
            return draw.choice(self.slots[slot])

        return re.sub(r"\{([a-z_]+)\}", value, text)

    def _operands(self) -> dict[str, str]:
        """Two numbers; the first is mostly the greater: one takes from what there is."""
        numbers = sorted(
            (self._number(), self._number()), key=int, reverse=self.random.random() < 0.7
        )
        return dict(zip("ab", numbers, strict=True))

    def _number(self) -> str:
        digits = self.random.randint(1, 4)
        number = self.random.randrange(10**digits)
        if self.random.random() < ROUND:
            number = round(number, -self.random.randint(1, digits))
        return str(number)

    def _latin(self) -> str:
        """A word, or the halves of two, which nobody knows."""
        word, other = self.random.choice(self.latin), self.random.choice(self.latin)
        if self.random.random() < 0.5:
            word = word[: len(word) // 2 + 1] + other[len(other) // 2 :]
        return self.random.choice([word, word.lower(), word.capitalize()])

    def _chinese(self) -> str:
        """One to four characters that seldom stand together."""
        starts = [
            self.random.randrange(len(self.chinese) - 2) for _ in range(self.random.randint(1, 2))
        ]
        return "".join(self.chinese[at : at + self.random.randint(1, 2)] for at in starts)

    def _city(self, question: str) -> str:
        """A city in the question's language, or a word that might be one."""
        chinese = re.search("[\u4e00-\u9fff]", question)
        if self.random.random() < KNOWN:
            city = self.random.choice(self.slots["city_zh" if chinese else "city_en"])
        else:
            city = self._chinese() if chinese else self._latin().capitalize()
        return city.lower() if self.random.random() < 0.15 else city
