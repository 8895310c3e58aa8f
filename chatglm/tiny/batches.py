"""Training conversations as batches of token ids."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence

from chatglm.text.tokenizer import ChatGLMTokenizer
from chatglm.tiny.corpus import Corpus

PIECES = 3600  # SentencePiece vocabulary; the special tokens come after it
UNK_PIECE = 0.05  # share of a question's pieces that become <unk>, so that no single one decides
SPLIT_PIECE = 0.2  # share that is split in two, as in BPE dropout, so that misspellings are known
TOOLLESS = 0.03  # share of questions that need a tool where none is declared
DECISION_WEIGHT = 10.0  # of the loss of a token that chooses a tool, or between + - * /
TOKENS = 5000  # at most in a batch, unless one conversation has more


@dataclass
class Batch:
    """One kind of batch: the conversations in it, and how often it is drawn."""

    rows: int  # conversations at most
    share: float  # how often it is drawn, among the kinds
    follow_up: float = 0.0  # share of exchanges that refer to the exchange before
    declared: int = 0  # tools at most
    # Share of questions for a tool. Where no tool is declared, the model is not taught to choose
    # one: the tool's name is given, and only its arguments are learned.
    tools: float = 0.0
    calls: bool = False  # the conversation ends with the call, before the result
    length: int = 0  # exchanges are added until the conversation has this many tokens
    cut: int | None = None  # of a longer last answer, only the first `cut` tokens are learned


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model as published: BPE with byte fallback.

    Text is not normalised: the default would turn ，！； into ASCII. Emoji are not in the
    vocabulary, so they take four byte pieces, as in the published one. A space joins the next
    piece only before a small letter. So a name has the same pieces after a space as after a
    quotation mark, and the model can copy it into a call.
    """
    model = io.BytesIO()
    lines = [
        re.sub("(?<! )( |^)(?=[^a-z ])", r"\1\t", line)
        for text in texts
        for line in re.sub("[\U0001f000-\U0001faff\ufffd]", "", text).split("\n")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pretokenization_delimiter="\t",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def encode(
    tokenizer: ChatGLMTokenizer, messages: list[dict], draw: random.Random, cut: int | None = None
) -> tuple[list, list]:
    """Ids of a conversation, and the weight of each in the loss.

    Only answers have a weight, with the <|user|> that ends them. The name of a tool that is
    "given" has none. Questions are split into other pieces each time (as in BPE dropout), except
    for the part of them that is "exact".
    """
    ids = [tokenizer.specials["[gMASK]"], tokenizer.specials["sop"]]
    counts = [0.0, 0.0]
    operators = tokenizer.sp.piece_to_id(list("+-*/"))
    for message in messages:
        new = tokenizer.encode_message(message)
        asks = message["role"] == "user"
        answers = message["role"] == "assistant"
        if asks and draw.random() < 0.8:
            new = new[:3] + spell(tokenizer, message["content"], message.get("exact", ""), draw)
        ends = counts[-1] > 0 and not answers  # <|user|> ends an answer, <|observation|> a call
        count = [float(ends)] + [float(answers)] * (len(new) - 1)
        if answers:
            head = len(tokenizer.encode_message({**message, "content": ""}))
            count[1:head] = [DECISION_WEIGHT] * (head - 1)  # the name of a tool, or none
        if "given" in message:
            count[1] = 0.0
        if "metadata" in message:
            count = [
                DECISION_WEIGHT if token in operators else one
                for token, one in zip(new, count, strict=True)
            ]
        ids, counts = ids + new, counts + count
        if answers and message is messages[-1] and cut and len(new) > cut:
            return ids[: cut - len(new)], counts[: cut - len(new)]
    end = "<|observation|>" if "metadata" in messages[-1] else "<|user|>"
    return ids + [tokenizer.specials[end]], counts + [1.0]


def spell(tokenizer: ChatGLMTokenizer, text: str, exact: str, draw: random.Random) -> list[int]:
    """Ids of the text. Some pieces are split or become <unk>, but none that is in `exact`."""
    ids, sp = [], tokenizer.sp
    for piece in sp.encode(text, out_type=str):
        if piece.strip("▁") in exact:
            ids.append(sp.piece_to_id(piece))
            continue
        at = draw.randrange(1, len(piece)) if len(piece) > 1 and draw.random() < SPLIT_PIECE else 0
        parts = [sp.piece_to_id(part) for part in (piece[:at], piece[at:]) if part]
        if sp.unk_id() in parts:
            parts = [sp.piece_to_id(piece)]
        ids += [0 if draw.random() < UNK_PIECE else part for part in parts]
    return ids


def conversation(corpus: Corpus, tokenizer: ChatGLMTokenizer, kind: Batch) -> tuple[list, list]:
    """Ids of one conversation of that kind, and the weight of each in the loss."""
    plain = not (kind.declared or kind.follow_up)
    messages, tools = ([], []) if plain else corpus.beginning(kind.declared)
    ids: list[int] = []
    while not ids or len(ids) < kind.length:
        if corpus.random.random() < kind.tools:
            messages += corpus.rounds.draw(tools, given=not tools)[: 2 if kind.calls else None]
        else:
            messages += corpus.exchange(kind.follow_up, toolless=0 if tools else TOOLLESS)
        ids, counts = encode(tokenizer, messages, corpus.random, kind.cut)
    return ids, counts


def batches(
    corpus: Corpus, tokenizer: ChatGLMTokenizer, kinds: list[Batch]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless: input ids [rows, length], padded on the right, and their weights in the loss.

    Conversations of similar length share a batch, or half of the work would be padding.
    """
    ready: list[list] = [[] for _ in kinds]
    while True:
        [i] = corpus.random.choices(range(len(kinds)), [kind.share for kind in kinds])
        if not ready[i]:
            drawn = sorted(
                (conversation(corpus, tokenizer, kinds[i]) for _ in range(8 * kinds[i].rows)),
                key=lambda pair: len(pair[0]),
            )
            while (
                drawn
            ):  # the longest first, with fewer rows: one may take as long as ten short ones
                rows = min(kinds[i].rows, max(1, TOKENS // len(drawn[-1][0])))
                ready[i].append(drawn[-rows:])
                del drawn[-rows:]
            corpus.random.shuffle(ready[i])
        ids, counts = zip(*ready[i].pop(), strict=True)
        yield (
            pad_sequence([torch.tensor(row) for row in ids], batch_first=True),
            pad_sequence([torch.tensor(row) for row in counts], batch_first=True),
        )
