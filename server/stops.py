"""Stop sequences: texts that end an answer, found while it streams.

Each character of the answer is looked at once for each stop sequence (Knuth, Morris and Pratt
1977): a search from the beginning, for each piece of text that comes, would take ever longer.
"""

from __future__ import annotations

import functools


class StopSequence:
    """Follows how much of one text stands at the end of what was read.

    >>> stop = StopSequence("aab")
    >>> [stop.push(character) for character in "aaab"]
    [1, 2, 2, 3]
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # characters of `text` with which what was read ends
        self._shorter = shorter_matches(text)

    def push(self, character: str) -> int:
        if self.matched == len(self.text):
            self.matched = self._shorter[self.matched - 1]
        self.matched = longest_match(self.text, self._shorter, self.matched, character)
        return self.matched


# The 64 answers to one request look for the same texts, at most 32.
@functools.lru_cache(maxsize=64)
def shorter_matches(text: str) -> list[int]:
    """Where a match of n characters breaks off, number n - 1 of this list still match."""
    shorter = [0]
    for character in text[1:]:
        shorter.append(longest_match(text, shorter, shorter[-1], character))
    return shorter


def longest_match(text: str, shorter: list[int], matched: int, character: str) -> int:
    """How many characters match after one more, where `matched` did before."""
    while matched and text[matched] != character:
        matched = shorter[matched - 1]
    return matched + (text[matched] == character)


FAR = 2000  # characters; over this, the library's search is faster than one step for each


class StopSearch:
    """The text of an answer up to the first stop sequence that is complete."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [StopSequence(text) for text in stops]
        self._read = 0  # characters

    def before_stop(self, text: str, ended: bool) -> tuple[str, bool]:
        """What of `text`, the answer so far, may be shown, and whether a stop sequence ends it.
        While more may come, an end that may be the beginning of one is held back.

        >>> search = StopSearch([", b"])
        >>> search.before_stop("a, ", ended=False), search.before_stop("a, b", ended=False)
        (('a', False), ('a', True))
        """
        if not self._stops:
            return text, False
        if len(text) - self._read > FAR:
            complete = self._complete_in(text)
            if complete:
                return text[: min(complete)[2]], True
            for stop in self._stops:
                stop.matched = 0
            self._read = len(text) - max(len(stop.text) for stop in self._stops)
        matched = [stop.matched for stop in self._stops]
        for i in range(self._read, len(text)):
            matched = [stop.push(text[i]) for stop in self._stops]
            lengths = [n for n, stop in zip(matched, self._stops) if n == len(stop.text)]
            if lengths:
                return text[: i + 1 - max(lengths)], True
        self._read = len(text)
        return (text if ended else text[: len(text) - max(matched)]), False

    def _complete_in(self, text: str) -> list[tuple[int, int, int]]:
        """(end, minus its length, beginning) of each stop sequence that ends in what is new."""
        found = []
        for stop in self._stops:
            length = len(stop.text)
            begin = text.find(stop.text, max(0, self._read - length + 1))
            if begin >= 0:
                found.append((begin + length, -length, begin))
        return found
