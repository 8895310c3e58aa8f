"""Keeps an answer within a form: which tokens may come next.

llguidance (https://github.com/guidance-ai/llguidance) follows the grammar. The sampler chooses
among the tokens that it allows.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import TYPE_CHECKING, Any, cast

import llguidance
import llguidance.hf
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from chatglm.errors import InvalidField
from chatglm.text.forms import AnswerForm
from chatglm.text.template import TemplateTokenizer

if TYPE_CHECKING:
    from chatglm.text.tokenizer import Tokenizer

# What one step may take at most: a few milliseconds, for about 300 optional properties. The model's
# thread has others to serve. Alternatives of alternatives may become a grammar that is thousands of
# times as large as the schema, and its first step holds the interpreter lock for seconds.
LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=50_000, step_max_items=60_000, max_grammar_size=10_000, verbose_errors=False
)
CHARACTERS_A_TOKEN = 6  # of a grammar, for each token of an answer: a rough guess
ENDS_AHEAD = 256  # tokens; so long before its limit, an answer is looked at
LOOK_EVERY = 4  # tokens, at most
FEW = 100  # tokens; there are not as many of one or two spaces and line ends
MAX_GUESSES = 16  # on the way to an end, where none of the following may come
# The first of these that may come brings an answer nearer to its end. The last two are for strings,
# in which a bracket is a character like any other.
CLOSERS = ("}])\"':,01ntf[{", "\"}])':,01ntf[{", "'}])\":,01ntf[{")
NEVER = -1e9  # added to a score; minus infinity would make the row look broken
# What eight tokens get, by the byte that has a bit for each.
BIASES = torch.tensor([[0.0 if byte >> i & 1 else NEVER for i in range(8)] for byte in range(256)])


class Vocabulary:
    """What llguidance must know of a tokenizer: the bytes of every token."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """The network may have more ids than the tokenizer."""
        tokens = tokenizer.token_bytes()[:vocab_size]
        tokens += [b""] * (vocab_size - len(tokens))
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]
        self.tokens = [token or b"\xff<%d>" % i for i, token in enumerate(tokens)]
        self.eos_token_id = tokenizer.stop_ids[0]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that stands behind another: at the beginning, a space would be added.
        A newline is a token of its own."""
        return self._encode("\n" + text)[len(self._encode("\n")) :]


class GrammarCompiler:
    """Makes constraints for one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._closers: list[list[int]] = []
        self._lock = threading.Lock()

    def compile(self, form: AnswerForm | None, begun: str = "") -> Constraint | None:
        """The constraint of an answer that has `begun`, if it has a form. Raises InvalidField."""
        if form is None:
            return None
        if torch.distributed.is_initialized():
            raise InvalidField(form.field, "cannot be kept to with --devices; leave it out")
        vocabulary, grammar = self.vocabulary(), form.grammar(self._tokenizer)
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
        if error := matcher.get_error() or self._try_out(matcher.deep_copy()):
            raise InvalidField(form.field, reason(error))
        if begun and not consume(matcher, vocabulary.tokenize_str(begun)):
            raise InvalidField("messages", f"end with an answer that {form.field} does not allow")
        margin = LOOK_EVERY + min(ENDS_AHEAD // 4, len(grammar) // CHARACTERS_A_TOKEN)
        return Constraint(matcher, self._closers, self._vocab_size, margin)

    def _try_out(self, matcher: llguidance.LLMatcher) -> str:
        """What goes wrong in the first steps, if anything. The first step of an object is the
        dearest, as a rule: it chooses among all properties."""
        following = may_follow(matcher, self._vocab_size)
        # A schema that refers to itself alone has no first character, only the space before it.
        if len(following) <= FEW and not self._tokenizer.decode(following.tolist()).strip():
            return "nothing can be written that fits"
        for token in self.vocabulary().tokenize_str('{"'):
            if token not in following or not consume(matcher, [token]):
                break
            following = may_follow(matcher, self._vocab_size)
        return matcher.get_error()

    def vocabulary(self) -> llguidance.LLTokenizer:
        """Takes up to a second, once."""
        with self._lock:
            if self._vocabulary is None:
                size, stop_ids = self._vocab_size, self._tokenizer.stop_ids
                if isinstance(self._tokenizer, TemplateTokenizer):
                    self._vocabulary = llguidance.hf.from_tokenizer(
                        cast(PreTrainedTokenizerFast, self._tokenizer.hf),
                        n_vocab=size,
                        eos_token=stop_ids,
                    )
                else:
                    wrapper = llguidance.TokenizerWrapper(Vocabulary(self._tokenizer, size))
                    self._vocabulary = llguidance.LLTokenizer(
                        wrapper, n_vocab=size, eos_token=stop_ids
                    )
                self._closers = [
                    [self._vocabulary.tokenize_str(each)[-1] for each in closers]
                    for closers in CLOSERS
                ]
            return self._vocabulary


def reason(error: str) -> str:
    """llguidance's own words, without its picture of the grammar."""
    first = error.partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
    if "grammar size" in first:
        first = "too many alternatives within each other"
    return f"cannot be served: {first[:200]}"


class Constraint:
    """Which tokens one answer may have next. Used by the model thread.

    Where the answer is about to reach its limit, it is brought to an end: cut JSON is no JSON.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        closers: list[list[int]],
        vocab_size: int,
        margin: int,
    ) -> None:
        """`margin`: tokens that one more may bring with it, such as the first of an object's."""
        self._initial, self._closers = matcher, closers
        self._vocab_size, self._margin = vocab_size, margin
        self._restart()

    def _restart(self) -> None:
        self.matcher, self._consumed = self._initial.deep_copy(), 0
        self._look_at = ENDS_AHEAD  # tokens left, at which the way to the end is measured next
        self._end: list[int] = []  # once it is brought to an end: the tokens that are left
        self.is_cut = False

    def again(self) -> Constraint:
        """The same, for another answer."""
        return Constraint(self._initial, self._closers, self._vocab_size, self._margin)

    def advance(self, tokens: list[int], left: int) -> None:
        """Takes in `tokens`, the whole answer so far. `left` is how many more there may be."""
        if len(tokens) < self._consumed:  # after a pause, an answer goes on where it was reported
            self._restart()
        consume(self.matcher, tokens[self._consumed :])
        self._consumed = len(tokens)
        if left <= self._look_at and not self.is_cut:
            self._bring_to_end(left)

    @property
    def error(self) -> str:
        """Why it cannot go on: the grammar takes too much time."""
        return self.matcher.get_error().partition("\n")[0]

    def next_of_end(self) -> int | None:
        """The token that must come, where the answer is brought to an end."""
        return self._end.pop(0) if self._end else None

    def _bring_to_end(self, left: int) -> None:
        """Decides whether it is time to, or when to look again."""
        end = self._shortest_end()
        if end is None:
            self._look_at = left // 2
            return
        to_spare = left - len(end) - self._margin
        self._look_at = left - max(LOOK_EVERY, to_spare // 2)
        if to_spare <= 0:
            self._end, self.is_cut = end, True

    def _shortest_end(self) -> list[int] | None:
        ends = []
        for closers in self._closers:
            end = self._end_by(closers)
            if end is not None:
                ends.append(end)
                if len(end) < LOOK_EVERY:
                    break  # short enough
        return min(ends, key=len, default=None)

    def _end_by(self, closers: list[int]) -> list[int] | None:
        """The tokens to an end, each time the first of `closers` that may come. None if there is no
        end near."""
        matcher, tokens, guesses = self.matcher.deep_copy(), list[int](), 0
        while not matcher.is_accepting():
            next_tokens = matcher.compute_ff_tokens()  # where there is no choice
            if not next_tokens:
                next_tokens = next(([t] for t in closers if matcher.validate_tokens([t])), [])
            if not next_tokens:
                guesses += 1
                next_tokens = may_follow(matcher, self._vocab_size)[-1:].tolist()
            tokens += next_tokens
            is_far = len(tokens) > ENDS_AHEAD or guesses > MAX_GUESSES
            if is_far or not matcher.consume_tokens(next_tokens):
                return None
        return tokens


def next_biases(constraints: list[Constraint], vocab_size: int) -> torch.Tensor:
    """What to add to the scores of each answer, [n, V]: 0 where a token may follow, else NEVER."""
    masks = masks_of([constraint.matcher for constraint in constraints], vocab_size)
    biases = BIASES[torch.from_numpy(masks).int()].flatten(1)[:, :vocab_size]
    for row, constraint in zip(biases, constraints, strict=True):
        token = constraint.next_of_end()
        if token is not None and row[token] == 0:
            row.fill_(NEVER)
            row[token] = 0
    return biases


def masks_of(matchers: list[llguidance.LLMatcher], vocab_size: int) -> np.ndarray:
    """A bit for each token that may come next, [n, bytes]; the first token has a byte's lowest bit.

    All in one call, which gives up the interpreter lock: it takes milliseconds to get it back from
    a busy event loop.
    """
    words = math.ceil(vocab_size / 32)
    masks = np.empty((len(matchers), words), dtype=np.uint32)
    places = [(matcher, row) for row, matcher in enumerate(matchers)]
    executor().unsafe_compute_mask_ptr(places, masks.ctypes.data, 4 * words, len(matchers))
    return masks.view(np.uint8)


def may_follow(matcher: llguidance.LLMatcher, vocab_size: int) -> np.ndarray:
    """The tokens that may come next. Without torch: in a thread that prepares a request, it would
    start worker threads, and those of the model would be slower from then on, see
    hardware/threads.py."""
    [mask] = masks_of([matcher], vocab_size)
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")[:vocab_size])


def consume(matcher: llguidance.LLMatcher, tokens: list[int]) -> bool:
    """Whether these tokens may follow. One by one: a call keeps the interpreter lock to its end."""
    return all(matcher.consume_token(token) for token in tokens)


@functools.cache
def executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor(num_threads=1)
