"""Token ids to text while they arrive, in whole characters only."""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\ufffd"  # decoders put it for bytes that are not, or not yet, a character
CUT_AFTER = 16  # ids; a longer run of broken bytes is split, or decoding it would take ever longer


class Detokenizer:
    """Collects ids and keeps their text, at the same cost per id however long the text is.

    `text` holds whole characters only; once `finish` was called it equals `decode(all ids)`, for
    any ids. The trick is to decode only the ids whose text is not settled yet, behind one ordinary
    token (the anchor), because decoders treat the beginning of a text differently.

    >>> d = Detokenizer(tokenizer.decode, anchor=tokenizer.encode("a")[-1])
    >>> d.push(first_two_bytes_of_a_character); d.text
    ''
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        anchor: int,
        clean: Callable[[str], str] = str,
        count_unsettled: Callable[[str], int] = lambda text: 0,
    ) -> None:
        """`clean` is done to decoded text, and `count_unsettled` says how many of the last
        characters it may still change."""
        self._decode, self._clean, self._count_unsettled = decode, clean, count_unsettled
        self._anchor = anchor
        self._anchor_text = decode([anchor])
        self._settled = ""
        self._ids: list[int] = []  # after the settled text
        self.text = ""

    def push(self, ids: list[int]) -> None:
        tail = self._tail(self._ids + ids)
        if len(ids) > 1 and tail.endswith(REPLACEMENT):
            # Some decoders give up a whole run of bytes if its last character is unfinished. One by
            # one, the ids of each character before it are settled.
            for i in ids:
                self.push([i])
            return
        self._ids = self._ids + ids
        # An unfinished character has three bytes at most, so older broken ones stay broken.
        held = min(3, len(tail) - len(tail.rstrip(REPLACEMENT)))
        held = held or self._count_unsettled(tail)
        self.text = self._settled + self._clean(tail[: len(tail) - held])
        if tail and not held:
            self._settled, self._ids = self.text, []
            return
        # Ids without text, such as special tokens, are dropped, or they would pile up.
        self._ids = [i for i in self._ids if self._decode([self._anchor, i]) != self._anchor_text]
        if tail and len(self._ids) > CUT_AFTER:
            self._cut(tail)

    def finish(self) -> str:
        """The whole text, including a broken character at its end."""
        self.text = self._settled + self._clean(self._tail(self._ids))
        return self.text

    def _tail(self, ids: list[int]) -> str:
        if not self._settled:
            return self._decode(ids)
        return self._decode([self._anchor, *ids])[len(self._anchor_text) :]

    def _cut(self, tail: str) -> None:
        """Settles all but the last few ids, where both parts decode as they did together."""
        for at in range(len(self._ids) - 1, 0, -1):
            before = self._tail(self._ids[:at])
            rest = self._decode([self._anchor, *self._ids[at:]])[len(self._anchor_text) :]
            cleaned = self._clean(before) + self._clean(rest)
            settled = self._count_unsettled(before + rest[:2]) <= 2
            if before and len(rest) > 4 and settled and cleaned == self._clean(tail):
                self._settled, self._ids = self._settled + self._clean(before), self._ids[at:]
                return
