"""What the tiny ChatGLM is trained on: conversations, drawn from `corpus.jsonl` without end.

A line of it is {"messages": [...]}. Where a user's `content` is a list, its entries are wordings
of one question, and wherever a conversation uses the first of them, any of them may stand.
"""

from __future__ import annotations

import io
import random
import re

import sentencepiece
import torch

from chatglm.tokenizer import ChatGLMTokenizer

PIECES = 2400  # SentencePiece vocabulary; the special tokens come after it
# Kinds of batch: how many conversations, how long each grows and where its first answer is cut
# off, in tokens, and how often an exchange is one that refers to the exchange before. Mostly first
# questions and how their answers begin, because to recognise the question is what is hard; some
# long conversations, so that the last question is found at any depth.
BATCHES = [(64, 0, 14, 0.0), (24, 0, 120, 0.6), (8, 400, None, 0.3), (2, 1600, None, 0.3)]
BATCH_SHARES = [0.6, 0.2, 0.12, 0.08]
BLANK = 0.05  # how many pieces of a question are blanked out, so that no single one decides
SYSTEM = 0.1  # how often a conversation opens with a system message


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
                self.weights.append(len(self.wordings[messages[0]["content"]]))
            else:
                self.follow_ups.append(messages)

    def exchange(self, follow_up: float) -> list[dict]:
        """A question with its answer; with that probability, a pair whose second needs the first."""
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
           answer_tokens: int | None = None) -> tuple[list, list]:
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
        if answer and message is messages[-1] and answer_tokens and len(new) > answer_tokens:
            return ids + new[:answer_tokens], learn + [False] + [True] * (answer_tokens - 1)
        ids += new
        learn += [message["role"] == "user" and len(learn) > 2] + [answer] * (len(new) - 1)
    return ids + [tokenizer.specials["<|user|>"]], learn + [True]


def draw_batch(corpus: Corpus, tokenizer: ChatGLMTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids [batch, length], padded on the right, and which of them to learn."""
    [(size, length, answer_tokens, follow_up)] = corpus.random.choices(BATCHES, BATCH_SHARES)
    rows = []
    for _ in range(size):
        messages = []
        if follow_up and corpus.random.random() < SYSTEM:
            messages.append({"role": "system", "content": corpus.random.choice(corpus.systems)})
        messages += corpus.exchange(follow_up)
        ids, learn = encode(tokenizer, messages, corpus.random, answer_tokens)
        while len(ids) < length:
            messages += corpus.exchange(follow_up)
            ids, learn = encode(tokenizer, messages, corpus.random)
        rows.append((ids, learn))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(size, longest, dtype=torch.long)
    learn_mask = torch.zeros(size, longest, dtype=torch.bool)
    for i, (ids, learn) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        learn_mask[i, : len(ids)] = torch.tensor(learn)
    return input_ids, learn_mask
