"""What the tiny ChatGLM is trained on: conversations, drawn from `corpus.jsonl` without end.

A line of it is {"messages": [...]}. Where a user's `content` is a list, its entries are wordings
of one question, and wherever a conversation uses the first of them, any of them may stand. Lines
with "tool" or "slot" are explained in `tool_rounds.py`.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence

from chatglm.tiny.tool_rounds import ToolRounds
from chatglm.tokenizer import ChatGLMTokenizer
from chatglm.tools import INTRODUCTION

PIECES = 3600  # SentencePiece vocabulary; the special tokens come after it
BLANK = 0.05  # how many pieces of a question are blanked out, so that no single one decides
SYSTEM = 0.1  # how often a conversation opens with a system message
LONG = 250  # characters; answers that are longer come up three times as often
TOOLLESS = 0.03  # how often a question needs a tool that is not there


@dataclass
class Batch:
    """A kind of batch: what it holds, and how often it comes up."""

    rows: int                  # conversations
    share: float               # how often, among the kinds of a phase
    follow_up: float = 0.0     # how often an exchange is one that refers to the exchange before
    declared: int = 0          # tools at most
    tools: float = 0.0         # how often one of them is asked for
    length: int = 0            # a conversation grows until it has so many tokens
    cut: int | None = None     # tokens of the last answer of one that does not grow


class Corpus:
    """Draws endless training conversations from the lines of a corpus file."""

    def __init__(self, lines: list[dict], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.wordings: dict[str, list[str]] = {}
        self.first, self.weights, self.follow_ups, self.systems = [], [], [], []
        for line in lines:
            if "tool" not in line and "slot" not in line:
                self._add(line["messages"])
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
            self.follow_ups.append(messages)

    def exchange(self, follow_up: float) -> list[dict]:
        """A question with its answer; with that probability, two, the second needing the first."""
        if self.random.random() < TOOLLESS:
            return self.rounds.draw([])
        if self.random.random() < follow_up:
            messages = self.random.choice(self.follow_ups)
        else:
            [messages] = self.random.choices(self.first, self.weights)
        return [{**m, "content": self.reword(self.wording(m["content"]))}
                if m["role"] == "user" else m for m in messages]

    def wording(self, question: str) -> str:
        """The question, or most often another wording of it."""
        return question if self.random.random() < 0.1 else self.random.choice(
            self.wordings[question])

    def beginning(self, kind: Batch) -> tuple[list[dict], list[dict]]:
        """The system message, if any, and the tools that it declares."""
        tools = self.rounds.declare(kind.declared) if kind.declared else []
        text = ""
        if (kind.declared or kind.follow_up) and self.random.random() < SYSTEM:
            text = self.random.choice(self.systems)
        if tools:
            text = (text + "\n" + INTRODUCTION).lstrip()
        message = {"role": "system", "content": text, "tools": [t.declaration for t in tools]}
        return [message] if text else [], tools

    def reword(self, text: str) -> str:
        """A question as people type it: see each line."""
        draw = self.random
        if draw.random() < 0.3:   # other punctuation at the end, or none
            text = text.rstrip("？?。.!！") + draw.choice(["", "", "？", "?", "。", ".", "！", "!"])
        if draw.random() < 0.2:   # no capitals
            text = text.lower()
        if draw.random() < 0.2:   # no space between Chinese and Latin letters
            text = re.sub(r"(?<=[\u4e00-\u9fff]) (?=\w)|(?<=\w) (?=[\u4e00-\u9fff])", "", text)
        if draw.random() < 0.1:   # a polite beginning
            polite = ["请问", "请问一下，", "你好，", "老师，", "我想问一下，", "那", "嗯，", "麻烦问下，"]
            if text.isascii():
                polite = ["Please, ", "hi, ", "ok, ", "so, ", "hey, ", "and ", "Sorry, ", "well, "]
            text = draw.choice(polite) + text
        if draw.random() < 0.1 and len(text) > 6 and "{" not in text:   # a slip of the keyboard
            at = draw.randrange(len(text))
            text = text[:at] + text[at + draw.choice([0, 1]):]
        return text

    def texts(self) -> list[str]:
        """Every text once, for the tokenizer."""
        texts = {m["content"] for line in self.first + self.follow_ups for m in line}
        texts |= {w for wordings in self.wordings.values() for w in wordings}
        for _ in range(300):
            tools = self.rounds.declare(4)
            texts |= {json.dumps([t.declaration for t in tools], indent=4, ensure_ascii=False)}
            texts |= {message["content"] for message in self.rounds.draw(tools)}
        return sorted(texts)


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model as published: BPE with byte fallback.

    Its text is left as it is: the default normalisation would turn ，！； into ASCII. Emoji are not
    in the vocabulary, so they take four byte pieces, as in the published one.
    """
    model = io.BytesIO()
    lines = [line for text in texts
             for line in re.sub("[\U0001F000-\U0001FAFF\ufffd]", "", text).split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=PIECES,
        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
        num_threads=1, minloglevel=2)
    return model.getvalue()


def encode(tokenizer: ChatGLMTokenizer, messages: list[dict], draw: random.Random,
           cut: int | None = None) -> tuple[list, list]:
    """Ids of a conversation, and for each whether the model learns to say it: answers, and
    <|user|> as their end. Users' words are cut in another way each time (BPE dropout)."""
    ids = [tokenizer.specials["[gMASK]"], tokenizer.specials["sop"]]
    learn = [False, False]
    for message in messages:
        new = tokenizer.encode_message(message)
        asks, answers = (message["role"] == role for role in ("user", "assistant"))
        if asks and "exact" not in message and draw.random() < 0.8:
            pieces = tokenizer.sp.encode(message["content"], enable_sampling=True, alpha=0.1)
            new = new[:3] + [0 if draw.random() < BLANK else i for i in pieces]
        if answers and message is messages[-1] and cut and len(new) > cut:
            return ids + new[:cut], learn + [False] + [True] * (cut - 1)
        ends = learn[-1] and not answers   # <|user|> ends an answer, <|observation|> a call
        ids += new
        learn += [ends] + [answers] * (len(new) - 1)
    return ids + [tokenizer.specials["<|user|>"]], learn + [True]


def conversation(corpus: Corpus, tokenizer: ChatGLMTokenizer, kind: Batch) -> tuple[list, list]:
    """Ids of one conversation of that kind, and which to learn."""
    messages, tools = corpus.beginning(kind)
    ids: list[int] = []
    while not ids or len(ids) < kind.length:
        if tools and corpus.random.random() < kind.tools:
            messages += corpus.rounds.draw(tools)
        else:
            messages += corpus.exchange(kind.follow_up)
        ids, learn = encode(tokenizer, messages, corpus.random, kind.cut)
    return ids, learn


def batches(corpus: Corpus, tokenizer: ChatGLMTokenizer,
            kinds: list[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Without end: input ids [rows, length], padded on the right, and which of them to learn.

    Conversations of one length come together, or half of the work would be padding.
    """
    ready: list[list] = [[] for _ in kinds]
    while True:
        [i] = corpus.random.choices(range(len(kinds)), [kind.share for kind in kinds])
        rows = kinds[i].rows
        if not ready[i]:
            drawn = sorted((conversation(corpus, tokenizer, kinds[i]) for _ in range(8 * rows)),
                           key=lambda conversation: len(conversation[0]))
            ready[i] = [drawn[at : at + rows] for at in range(0, len(drawn), rows)]
            corpus.random.shuffle(ready[i])
        ids, learn = zip(*ready[i].pop(), strict=True)
        yield (pad_sequence([torch.tensor(row) for row in ids], batch_first=True),
               pad_sequence([torch.tensor(row) for row in learn], batch_first=True))
