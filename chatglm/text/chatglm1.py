"""The first ChatGLM-6B's tokenizer, its chat format, and what it does to an answer's punctuation.

After tokenization_chatglm.py and modeling_chatglm.py of THUDM/chatglm-6b.
"""

from __future__ import annotations

import re
import struct

from sentencepiece import SentencePieceProcessor

from chatglm.text.detokenizer import Detokenizer
from chatglm.text.rounds import to_rounds
from chatglm.text.tokenizer import fill_in_year, piece_bytes

LONGEST_BLANK = 80  # spaces that one token stands for
TAB = "<|tab|>"
# Pieces that the first files (150528 words) lack, in order; the published code added them.
CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
SPACES = [TAB, *(f"<|blank_{count}|>" for count in range(2, LONGEST_BLANK + 1))]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Their types in SentencePiece's model format, and the number of the setting that uses the bytes.
CONTROL_TYPE, USER_DEFINED_TYPE, BYTE_TYPE, BYTE_FALLBACK = 3, 4, 6, 35


class ChatGLM1Tokenizer:
    """`ice_text.model`. In the files of before April 2023 `num_image_tokens` ids for images come
    before the words. A special token is never produced from text."""

    chat_format = "chatglm"
    has_metadata = False

    def __init__(self, sentencepiece_model: bytes, num_image_tokens: int | None, sop: int) -> None:
        """`num_image_tokens` None: as many as bring `<sop>` to the id `sop`."""
        self.sp = SentencePieceProcessor(model_proto=sentencepiece_model)
        if self.sp.piece_to_id("<sop>") == self.sp.unk_id():
            self.sp = SentencePieceProcessor(model_proto=sentencepiece_model + missing_pieces())
        if num_image_tokens is None:
            num_image_tokens = max(0, sop - self.sp.piece_to_id("<sop>"))
        self.num_image_tokens = num_image_tokens
        self.vocab_size = num_image_tokens + self.sp.vocab_size()
        self.specials = {name: self._id(name) for name in ["<pad>", *CONTROL]}
        self.stop_ids = [self.specials["<eop>"]]
        silent = {i for i in range(self.sp.vocab_size()) if self.sp.is_control(i)}
        self._spoken = set(range(self.sp.vocab_size())) - silent - {self.sp.piece_to_id("<pad>")}
        self.anchor = self.encode("a")[-1]
        pieces = (len(self.sp.id_to_piece(i)) for i in range(self.sp.vocab_size()))
        self.longest_token = max(LONGEST_BLANK, *pieces)

    def _id(self, piece: str) -> int:
        return self.num_image_tokens + self.sp.piece_to_id(piece)

    def encode(self, text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", TAB)
        text = re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return [self.num_image_tokens + i for i in self.sp.encode(text)]

    def encode_plain(self, text: str) -> list[int]:
        return [*self.encode(text), self.specials["[gMASK]"], self.specials["<sop>"]]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        return self.encode_plain(chatglm1_prompt(messages))

    def decode(self, ids: list[int]) -> str:
        return clean_up(self._decode(ids))

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._decode, self.anchor, CLEANED)

    def token_bytes(self) -> list[bytes]:
        """The text of every id, in UTF-8; of special tokens nothing."""
        own = piece_bytes(self.sp)
        for i, piece in enumerate(own):
            if i not in self._spoken:
                own[i] = b""
            elif piece == b"<n>":
                own[i] = b"\n"
            elif piece == TAB.encode():
                own[i] = b"\t"
            elif blank := re.fullmatch(rb"<\|blank_(\d+)\|>", piece):
                own[i] = b" " * int(blank[1])
        return [b""] * self.num_image_tokens + own

    def _decode(self, ids: list[int]) -> str:
        own = [i - self.num_image_tokens for i in ids]
        text = self.sp.decode([i for i in own if i in self._spoken])
        text = text.replace("<n>", "\n").replace(TAB, "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda blank: " " * int(blank[1]), text)

    def visible(self, raw: str, finished: bool) -> str:
        """The answer with its punctuation put right. While it is not `finished`, an end that could
        still change is held back."""
        # Only the end is searched, or a long answer would be searched for every token.
        text = raw if finished else raw[:-2] + UNSETTLED_PUNCTUATION.sub("", raw[-2:])
        return punctuate(fill_in_year(text, finished).strip())


def missing_pieces() -> bytes:
    """What to append to a model file that lacks the pieces above: in protocol buffers, files one
    after the other are merged."""
    types = [(CONTROL, CONTROL_TYPE), (SPACES, USER_DEFINED_TYPE), (BYTES, BYTE_TYPE)]
    pieces = b"".join(encode_piece(name, kind) for names, kind in types for name in names)
    setting = bytes([BYTE_FALLBACK << 3 & 0x7F | 0x80, BYTE_FALLBACK >> 4, 1])  # of TrainerSpec
    return pieces + b"\x12" + bytes([len(setting)]) + setting


def encode_piece(name: str, kind: int) -> bytes:
    """A SentencePiece of a ModelProto: 1 is its name, 2 its score (0), 3 its type."""
    text = name.encode()
    piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0) + bytes([24, kind])
    return b"\x0a" + bytes([len(piece)]) + piece


def chatglm1_prompt(messages: list[dict]) -> str:
    """The query alone, or `[Round 0]\\n问：…\\n答：…\\n[Round 1]\\n问：…\\n答：` (published
    `chat`)."""
    *history, (query, _) = to_rounds(messages, between="\n")
    if not history:
        return query
    rounds = [
        f"[Round {number}]\n问：{question}\n答：{answer}\n"
        for number, (question, answer) in enumerate(history)
    ]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


# What the library's decoding of that time did (clean_up_tokenization), in its order.
CLEANED = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")]
CLEANED += [(f" '{end}", f"'{end}") for end in ("m", "s", "ve", "re")]
# The end that may still become full-width, before a Chinese character.
UNSETTLED_PUNCTUATION = re.compile(r"(?<![\u4e00-\u9fff])[,!:;?]\Z")


def clean_up(text: str) -> str:
    for spaced, joined in CLEANED:
        text = text.replace(spaced, joined)
    return text


def punctuate(text: str) -> str:
    """Full-width punctuation beside Chinese characters (published `process_response`)."""
    for narrow, wide in zip(",!:;?", "，！：；？", strict=True):
        text = re.sub(rf"([\u4e00-\u9fff])\{narrow}", rf"\1{wide}", text)
        text = re.sub(rf"\{narrow}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text
