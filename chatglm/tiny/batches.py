"""From conversations to what a network is trained on: token ids, in batches."""

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
BLANK = 0.05  # how many pieces of a question are blanked out, so that no single one decides
CUT = 0.2  # how many are cut in two, so that other spellings are no surprise
TOOLLESS = 0.03  # how often a question needs a tool where there is none
DECIDES = 10.0  # how much a token counts that decides for a tool, or between + - * /
TOKENS = 5000  # at most in a batch, or one conversation


@dataclass
class Batch:
    """A kind of batch: what it holds, and how often it comes up."""

    rows: int  # conversations at most
    share: float  # how often, among the kinds
    follow_up: float = 0.0  # how often an exchange is one that refers to the exchange before
    declared: int = 0  # tools at most
    tools: float = 0.0  # how often a question is for a tool; if none is declared, that
    # one is to be called is given, and the call is learned
    calls: bool = False  # such a question ends with the call
    length: int = 0  # a conversation grows until it has so many tokens
    cut: int | None = None  # tokens of the last answer that are learned, where it is longer


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model as published: BPE with byte fallback.

    Its text is left as it is: the default normalisation would turn ，！； into ASCII. Emoji are not
    in the vocabulary, so they take four byte pieces, as in the published one. A space and what
    follows it are one piece only if that is a small letter: names are spelled alike everywhere,
    after a space or a quotation mark, or the model could not copy them into a call.
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
    """Ids of a conversation, and for each how much it counts that the model learns to say it: 0
    but for answers, and <|user|> as their end; 0 too for which tool is called where that is
    "given". Questions are spelled in another way each time (as in BPE dropout), but for what is
    "exact" in them."""
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
            count[1:head] = [DECIDES] * (head - 1)  # the name of a tool, or none
        if "given" in message:
            count[1] = 0.0
        if "metadata" in message:
            count = [
                DECIDES if token in operators else one
                for token, one in zip(new, count, strict=True)
            ]
        ids, counts = ids + new, counts + count
        if answers and message is messages[-1] and cut and len(new) > cut:
            return ids[: cut - len(new)], counts[: cut - len(new)]
    end = "<|observation|>" if "metadata" in messages[-1] else "<|user|>"
    return ids + [tokenizer.specials[end]], counts + [1.0]


def spell(tokenizer: ChatGLMTokenizer, text: str, exact: str, draw: random.Random) -> list[int]:
    """Ids of the text, some pieces cut in two or blanked out, but none that is in `exact`."""
    ids, sp = [], tokenizer.sp
    for piece in sp.encode(text, out_type=str):
        if piece.strip("▁") in exact:
            ids.append(sp.piece_to_id(piece))
            continue
        at = draw.randrange(1, len(piece)) if len(piece) > 1 and draw.random() < CUT else 0
        parts = [sp.piece_to_id(part) for part in (piece[:at], piece[at:]) if part]
        if sp.unk_id() in parts:
            parts = [sp.piece_to_id(piece)]
        ids += [0 if draw.random() < BLANK else part for part in parts]
    return ids


def conversation(corpus: Corpus, tokenizer: ChatGLMTokenizer, kind: Batch) -> tuple[list, list]:
    """Ids of one conversation of that kind, and how much each counts."""
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
    """Without end: input ids [rows, length], padded on the right, and how much each counts.

    Conversations of one length come together, or half of the work would be padding.
    """
    ready: list[list] = [[] for _ in kinds]
    while True:
        [i] = corpus.random.choices(range(len(kinds)), [kind.share for kind in kinds])
        if not ready[i]:
            drawn = sorted(
                (conversation(corpus, tokenizer, kinds[i]) for _ in range(8 * kinds[i].rows)),
                key=lambda pair: len(pair[0]),
            )
            while drawn:  # the longest first, and fewer of them: one could take as long as ten
                rows = min(kinds[i].rows, max(1, TOKENS // len(drawn[-1][0])))
                ready[i].append(drawn[-rows:])
                del drawn[-rows:]
            corpus.random.shuffle(ready[i])
        ids, counts = zip(*ready[i].pop(), strict=True)
        yield (
            pad_sequence([torch.tensor(row) for row in ids], batch_first=True),
            pad_sequence([torch.tensor(row) for row in counts], batch_first=True),
        )
