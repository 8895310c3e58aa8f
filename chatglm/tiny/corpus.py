"""What the tiny ChatGLM is trained on: conversations, drawn from `corpus.jsonl` without end.

A line of it is {"messages": [...]}. Where a user's `content` is a list, its entries are wordings
of one question, and wherever a conversation uses the first of them, any of them may stand.
"""

from __future__ import annotations

import io
import random
import re
from dataclasses import dataclass

import sentencepiece
import torch

from chatglm.tokenizer import ChatGLMTokenizer

PIECES = 2400  # SentencePiece vocabulary; the special tokens come after it
BLANK = 0.05  # how many pieces of a question are blanked out, so that no single one decides
SYSTEM = 0.1  # how often a conversation opens with a system message
LONG = 250  # characters; answers that are longer come up three times as often


@dataclass
class Batch:
    """A kind of batch: what it holds, and how often it comes up."""

    rows: int                  # conversations
    share: float               # how often, among the kinds of a phase
    follow_up: float           # how often an exchange is one that refers to the exchange before
    length: int = 0            # a conversation grows until it has so many tokens
    cut: int | None = None     # tokens of the last answer of one that does not grow


class Corpus:
    """Draws endless training conversations from the lines of a corpus file."""

    def __init__(self, lines: list[list[dict]], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.wordings: dict[str, list[str]] = {}
        self.first, self.weights, self.follow_ups, self.systems = [], [], [], []
        for messages in lines:
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
        if self.random.random() < follow_up:
            messages = self.random.choice(self.follow_ups)
        else:
            [messages] = self.random.choices(self.first, self.weights)
        return [{**m, "content": self.reword(m["content"])} if m["role"] == "user" else m
                for m in messages]

    def reword(self, question: str) -> str:
        """One of the question's wordings, typed as people type: see each line."""
        draw = self.random
        text = draw.choice(self.wordings[question])
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
        if draw.random() < 0.1 and len(text) > 6:   # a slip of the keyboard
            at = draw.randrange(len(text))
            text = text[:at] + text[at + draw.choice([0, 1]):]
        return text

    def texts(self) -> list[str]:
        """Every text once, for the tokenizer."""
        answers = {m["content"] for line in self.first + self.follow_ups for m in line}
        return sorted(answers | {w for wordings in self.wordings.values() for w in wordings})


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
        remove_extra_whitespaces=False, split_digits=True, num_threads=1, minloglevel=2)
    return model.getvalue()


def encode(tokenizer: ChatGLMTokenizer, messages: list[dict], draw: random.Random,
           cut: int | None = None) -> tuple[list, list]:
    """Ids of a conversation, and for each whether the model learns to say it: answers, and
    <|user|> as their end. Users' words are cut in another way each time (BPE dropout)."""
    ids = [tokenizer.specials["[gMASK]"], tokenizer.specials["sop"]]
    learn = [False, False]
    for message in messages:
        new = tokenizer.encode_message(message)
        if message["role"] == "user" and draw.random() < 0.8:
            pieces = tokenizer.sp.encode(message["content"], enable_sampling=True, alpha=0.1)
            new = new[:3] + [0 if draw.random() < BLANK else i for i in pieces]
        answer = message["role"] == "assistant"
        if answer and message is messages[-1] and cut and len(new) > cut:
            return ids + new[:cut], learn + [False] + [True] * (cut - 1)
        ids += new
        learn += [message["role"] == "user" and len(learn) > 2] + [answer] * (len(new) - 1)
    return ids + [tokenizer.specials["<|user|>"]], learn + [True]


def draw_batch(corpus: Corpus, tokenizer: ChatGLMTokenizer,
               kinds: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids [rows, length], padded on the right, and which of them to learn."""
    [kind] = corpus.random.choices(kinds, [kind.share for kind in kinds])
    rows = []
    for _ in range(kind.rows):
        messages = []
        if kind.follow_up and corpus.random.random() < SYSTEM:
            messages.append({"role": "system", "content": corpus.random.choice(corpus.systems)})
        messages += corpus.exchange(kind.follow_up)
        ids, learn = encode(tokenizer, messages, corpus.random, kind.cut)
        while len(ids) < kind.length:
            messages += corpus.exchange(kind.follow_up)
            ids, learn = encode(tokenizer, messages, corpus.random)
        rows.append((ids, learn))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(kind.rows, longest, dtype=torch.long)
    learn_mask = torch.zeros(kind.rows, longest, dtype=torch.bool)
    for i, (ids, learn) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        learn_mask[i, : len(ids)] = torch.tensor(learn)
    return input_ids, learn_mask
