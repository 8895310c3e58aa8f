"""Token ids to text while they arrive, in whole characters only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

REPLACEMENT = "\ufffd"  # decoders put it for bytes that are not, or not yet, a character
CUT_AFTER = 16  # ids; a longer run of broken bytes is split, or decoding it would take ever longer


class Replacement:
    """`str.replace` on a text that arrives in parts. Its end, if `old` may begin there, is held.

    >>> r = Replacement(" n't", "n't")
    >>> r.push("I do n"), r.push("'t"), r.push(" now"), r.flush()
    ('I do', "n't", ' now', '')
    """

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""

    def push(self, text: str) -> str:
        # Only what was not replaced is searched again, as `str.replace` never looks at `new`.
        *done, rest = (self._held + text).split(self._old)
        held = max(size for size in range(len(self._old)) if rest.endswith(self._old[:size]))
        settled = len(rest) - held
        self._held = rest[settled:]
        return self._new.join([*done, rest[:settled]])

    def flush(self) -> str:
        """The end that was held, when no more text comes."""
        held, self._held = self._held, ""
        return held


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
        replaced: Iterable[tuple[str, str]] = (),
    ) -> None:
        """`replaced`: pairs (old, new), replaced in decoded text one pair after the other."""
        self._decode = decode
        self._anchor = anchor
        self._anchor_text = decode([anchor])
        self._replacements = [Replacement(old, new) for old, new in replaced]
        self._begun = False  # whether any text is settled
        self._ids: list[int] = []  # after the settled text
        self._shown = 0  # characters of these ids' text that were passed on already
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
        self._show(tail[: len(tail) - held])
        if tail and not held:
            self._begun, self._ids, self._shown = True, [], 0
            return
        # Ids without text, such as special tokens, are dropped, or they would pile up.
        self._ids = [i for i in self._ids if self._decode([self._anchor, i]) != self._anchor_text]
        if not tail:
            # Spaces that the decoder drops at the beginning, however many: some stand for all.
            self._ids = self._ids[-CUT_AFTER:]
        elif len(self._ids) > CUT_AFTER:
            self._cut(tail)

    def finish(self) -> str:
        """The whole text, including a broken character at its end."""
        self._show(self._tail(self._ids))
        held = ""
        for replacement in self._replacements:
            held = replacement.push(held) + replacement.flush()
        self.text += held
        return self.text

    def _tail(self, ids: list[int]) -> str:
        if not self._begun:
            return self._decode(ids)
        return self._decode([self._anchor, *ids])[len(self._anchor_text) :]

    def _show(self, tail: str) -> None:
        new = tail[self._shown :]
        self._shown += len(new)
        for replacement in self._replacements:
            new = replacement.push(new)
        self.text += new

    def _cut(self, tail: str) -> None:
        """Settles all but the last few ids, where both parts decode as they did together."""
        for at in range(len(self._ids) - 1, 0, -1):
            before = self._tail(self._ids[:at])
            rest = self._decode([self._anchor, *self._ids[at:]])[len(self._anchor_text) :]
            # Of the rest, some is shown already: all but three characters.
            if before and len(rest) > 4 and before + rest == tail:
                self._begun, self._ids = True, self._ids[at:]
                self._shown -= len(before)
                return
