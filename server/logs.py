"""The log. What strangers wrote is cleaned here, whoever logs it: a line stays one line."""

from __future__ import annotations

import logging
import unicodedata

JOINERS = "\u200c\u200d"  # of letters in Persian, of emoji in a family: invisible, and harmless


def setup_log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("chatglm").setLevel(logging.INFO)


class CleanFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback, which follows it on lines of its own."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def printable(text: str) -> str:
    r"""With escapes for what a terminal would obey, or would not show.

    >>> printable("a\n12:00:00 b\x1b[2J")
    'a\\n12:00:00 b\\x1b[2J'
    """
    return "".join(ascii(c)[1:-1] if is_unseen(c) else c for c in text)


def is_unseen(character: str) -> bool:
    """Control characters, marks that change the direction of text, lone surrogates, line ends."""
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
