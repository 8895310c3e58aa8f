"""Endless training conversations for the tiny ChatGLM, drawn from `corpus.jsonl`.

A line of it is {"messages": [...]}. Where a user's `content` is a list, its entries are wordings
of one question: wherever a conversation uses the first of them, any of them may be drawn. Lines
with "tool" or "slot" are explained in `tool_rounds.py`.
"""

from __future__ import annotations

import json
import random
import re

from chatglm.text.tools import declare
from chatglm.tiny.tool_rounds import Tool, ToolRounds

SYSTEM = 0.1  # how often a conversation opens with a system message
LONG = 250  # characters; longer answers are drawn three times as often
AGAIN = 0.4  # how often a follow-up is followed by another
OTHER = 0.15  # how often "shorter" and "for example" are asked in the other language

# Questions that refer to the answer before: after a Chinese one, after an English one.
TRANSLATE = ("用英文说", "Say that in Chinese")
SHORTEN = ("再短一点", "Make it shorter")
EXAMPLE = ("举个例子", "Give me an example")


class Corpus:
    """Draws endless training conversations from the lines of a corpus file."""

    def __init__(self, lines: list[dict], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.wordings: dict[str, list[str]] = {}
        self.first: list[list[dict]] = []  # conversations of one exchange
        self.weights: list[int] = []  # how often each of these is drawn
        self.systems: list[str] = []
        self.follow_ups: dict[str, dict[str, str]] = {}  # answer -> question that refers to it
        for line in lines:
            if "tool" not in line and "slot" not in line:
                self._add(line["messages"])
        self._link()
        self.beginnings = [
            messages for messages in self.first if messages[1]["content"] in self.follow_ups
        ]
        self.answers = [messages[1]["content"] for messages in self.first]
        self.rounds = ToolRounds(lines, self.answers, self.random, self.reword)

    def _add(self, messages: list[dict]) -> None:
        for message in messages:
            if isinstance(message["content"], list):
                self.wordings[message["content"][0]] = message["content"]
                message["content"] = message["content"][0]
        if messages[0]["role"] == "system":
            self.systems += self.wordings[messages[0]["content"]]
        elif len(messages) == 2:
            self.first.append(messages)
            practice = 3 if len(messages[1]["content"]) > LONG else 1
            self.weights.append(practice * len(self.wordings[messages[0]["content"]]))
        else:
            _, before, question, answer = (message["content"] for message in messages)
            self.follow_ups.setdefault(before, {})[question] = answer

    def _link(self) -> None:
        """Adds follow-ups to follow-ups, which no line of the corpus has: the shorter answer or the
        example in the other language, and an example after the shorter answer."""
        for answers in list(self.follow_ups.values()):
            for zh, en in (SHORTEN, EXAMPLE):
                other = self.follow_ups.get(answers.get(TRANSLATE[0], ""), {})
                if zh in answers and en in other:
                    for text, question, translated in (
                        (answers[zh], TRANSLATE[0], other[en]),
                        (other[en], TRANSLATE[1], answers[zh]),
                    ):
                        self.follow_ups.setdefault(text, {}).setdefault(question, translated)
            for shorten, example in zip(SHORTEN, EXAMPLE, strict=True):
                if shorten in answers and example in answers:
                    self.follow_ups[answers[shorten]].setdefault(example, answers[example])

    def exchange(self, follow_up: float, toolless: float = 0.0) -> list[dict]:
        """A question with its answer; with the probability `follow_up`, more of them, each about
        the last; with `toolless`, one that needs a tool, and that it cannot be answered."""
        draw = self.random
        if draw.random() < toolless:
            return self.rounds.draw([])
        goes_on = draw.random() < follow_up
        if goes_on:
            messages = list(draw.choice(self.beginnings))
        else:
            [messages] = draw.choices(self.first, self.weights)
        while goes_on:
            questions = self.follow_ups[messages[-1]["content"]]
            question = draw.choice(list(questions))
            messages += [
                {"role": "user", "content": self._either(question)},
                {"role": "assistant", "content": questions[question]},
            ]
            goes_on = questions[question] in self.follow_ups and draw.random() < AGAIN
        return [
            {**m, "content": self.reword(self.wording(m["content"]))} if m["role"] == "user" else m
            for m in messages
        ]

    def _either(self, question: str) -> str:
        """The question, sometimes in the other language: the answer stays in the last one's."""
        for pair in (SHORTEN, EXAMPLE):
            if question in pair and self.random.random() < OTHER:
                return self.random.choice(pair)
        return question

    def wording(self, question: str) -> str:
        """The question, or most often another wording of it."""
        return (
            question if self.random.random() < 0.1 else self.random.choice(self.wordings[question])
        )

    def beginning(self, most_tools: int) -> tuple[list[dict], list[Tool]]:
        """The system message, if any, and the tools that it declares."""
        tools = self.rounds.declare(most_tools) if most_tools else []
        text = self.random.choice(self.systems) if self.random.random() < SYSTEM else ""
        messages = [{"role": "system", "content": text}] if text else []
        if tools:
            messages = declare(messages, [tool.declaration for tool in tools])
        return messages, tools

    def reword(self, text: str) -> str:
        """A question as people type it: see each line."""
        draw = self.random
        if draw.random() < 0.3:  # other punctuation at the end, or none
            text = text.rstrip("？?。.!！") + draw.choice(["", "", "？", "?", "。", ".", "！", "!"])
        if draw.random() < 0.2:  # no capitals
            text = text.lower()
        if draw.random() < 0.2:  # no space between Chinese and Latin letters
            text = re.sub(r"(?<=[\u4e00-\u9fff]) (?=\w)|(?<=\w) (?=[\u4e00-\u9fff])", "", text)
        if draw.random() < 0.1:  # a polite beginning
            polite = [
                "请问",
                "请问一下，",
                "你好，",
                "老师，",
                "我想问一下，",
                "那",
                "嗯，",
                "麻烦问下，",
            ]
            if text.isascii():
                polite = ["Please, ", "hi, ", "ok, ", "so, ", "hey, ", "and ", "Sorry, ", "well, "]
            text = draw.choice(polite) + text
        if draw.random() < 0.1 and len(text) > 6 and "{" not in text:  # a slip of the keyboard
            at = draw.randrange(len(text))
            text = text[:at] + text[at + draw.choice([0, 1]) :]
        return text

    def texts(self) -> list[str]:
        """Every text once, for the tokenizer."""
        texts = {m["content"] for line in self.first for m in line}
        texts |= {answer for answers in self.follow_ups.values() for answer in answers.values()}
        texts |= {w for wordings in self.wordings.values() for w in wordings}
        for _ in range(300):
            tools = self.rounds.declare(4)
            texts |= {json.dumps([t.declaration for t in tools], indent=4, ensure_ascii=False)}
            texts |= {message["content"] for message in self.rounds.draw(tools)}
        return sorted(texts)
