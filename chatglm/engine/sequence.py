"""One request in flight, from `Engine.prepare` to the last token of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from chatglm.engine.statistics import RequestStats
from chatglm.errors import EngineError
from chatglm.sampling import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from chatglm.engine.transformers_batch import Batch
    from chatglm.text.constraint import Constraint

MIN_INTERVAL = 0.04  # seconds between two chunks of an answer: 25 a second look smooth
FIRST_TOKENS_UNTHROTTLED = 8  # these are passed on as they come


@dataclass
class Chunk:
    """An answer so far."""

    text: str  # what a user sees
    # The same with the metadata line that a ChatGLM3 answer begins with. Where it has several
    # messages, ANOTHER_MESSAGE of text/tokenizer.py stands between them.
    raw: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None = None  # "stop" or "length" in the last chunk
    hidden_tokens: int = 0  # of these, before the first that a user sees
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of what a user sees, if asked for


class Output(NamedTuple):
    """What the model thread reports of a sequence after a step."""

    token_ids: list[int]  # all tokens of the answer so far
    is_finished: bool  # the sequence has left the batch
    error: str | None = None  # why there will be no whole answer


@dataclass(eq=False)
class Sequence:
    """A checked and tokenised request. The word is vLLM's.

    The model thread writes to `latest`, `logprobs` and `failure`. The rest is set on the event
    loop.
    """

    input_ids: list[int]  # the prompt
    max_new_tokens: int
    params: SamplingParams  # with a seed
    forced_prefix: str = ""  # the answer begins with this text; it is not generated
    begun_length: int = 0  # characters at its beginning that the client knows, having begun it
    is_plain: bool = False  # it goes on with a text, in no conversation: all of it is shown
    constraint: Constraint | None = None  # what form it must have

    trace_id: str = field(default="", init=False)  # what the client calls it, for the log

    # Set when the engine takes the request.
    request_id: str = field(default="", init=False)
    client: str = field(default="", init=False)  # who asks: places are shared out by client
    cache_salt: str = field(default="", init=False)  # it shares cached prefixes with this one
    num_blocks: int = field(default=0, init=False)  # of the KV cache, at most
    latest: LatestOutput = field(init=False)
    stats: RequestStats = field(init=False)

    # Set while it runs.
    batch: Batch | None = field(default=None, init=False)
    batch_id: str = field(default="", init=False)  # its name there, a new one after each pause
    resumed_ids: list[int] = field(default_factory=list, init=False)  # tokens made before a pause
    # Written by the model thread, if they were asked for, before it reports the token: by position.
    new_logprobs: dict[int, TokenLogprob] = field(default_factory=dict, init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)  # of the chunks so far
    failure: str | None = field(default=None, init=False)  # why it cannot go on

    @property
    def max_tokens(self) -> int:
        """How long the answer may be, at least."""
        return min(self.max_new_tokens, self.params.max_visible_tokens or self.max_new_tokens)

    @property
    def is_cut(self) -> bool:
        """Whether the answer was brought to an end by its limit, though it looks whole."""
        return self.constraint is not None and self.constraint.is_cut

    def logprobs_of(self, tokens: range) -> list[TokenLogprob]:
        """Of these tokens of the answer, if they were asked for. They begin with the same one each
        time: each is looked up once, however long the answer."""
        if self.params.logprobs is None:
            return []
        for number in tokens[len(self.logprobs) :]:
            self.logprobs.append(self.new_logprobs.pop(len(self.input_ids) + number))
        return self.logprobs[: len(tokens)]

    def again(self, number: int) -> Sequence:
        """The same request for another answer: its seed is `number` further."""
        seed = ((self.params.seed or 0) + number) % 2**32
        params = replace(self.params, seed=seed)
        constraint = self.constraint and self.constraint.again()
        # It does not copy fields with init=False.
        other = replace(self, params=params, constraint=constraint)
        other.trace_id = self.trace_id
        return other


class LatestOutput:
    """A mailbox with one slot, between the model thread and the reader of one sequence.

    Only the newest output is kept. Nothing is lost: each output holds all tokens so far. The
    event loop is woken for the first few tokens as they come, then every `MIN_INTERVAL`, and for
    the last: while Python runs on the event loop, the model thread waits for the interpreter.
    """

    _throttle: asyncio.TimerHandle | None = None  # runs out when the next chunk may leave

    def __init__(self, on_finished: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._output: Output | None = None
        self._failure: EngineError | None = None
        self._on_finished, self._arrived = on_finished, asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_finished(self) -> bool:
        return self._output is not None and self._output.is_finished

    @property
    def token_ids(self) -> list[int]:
        return [] if self._output is None else self._output.token_ids

    def limit_time(self, seconds: float) -> None:
        """The answer fails after so many seconds. Calling it again changes nothing."""
        if self._timer is None:
            # One timer per sequence: asyncio.timeout() around each wait costs as much as the wait.
            error = EngineError(f"the answer took more than {seconds:g} s", "timeout")
            self._timer = self.loop.call_later(seconds, self.fail, error)

    def set(self, output: Output) -> bool:
        """Called by the model thread, once a step. True if `notify` must be called on the loop."""
        if self._output is not None and self._output.error is not None:
            output = output._replace(error=self._output.error)  # the reader may not know it yet
        # Store before reading `_throttle`. `_end_throttle` clears it, then compares outputs, so
        # one of the two always sees the other's write.
        self._output = output
        return self._throttle is None or output.is_finished

    def notify(self) -> None:
        if self.is_finished:
            self._on_finished()  # now, because the reader may have stopped reading
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """Called on the loop: the reader gets this error, and no more output."""
        self._failure = error
        self._arrived.set()

    async def next(self) -> Output:
        """The next output that the reader has not seen. Raises EngineError if it failed."""
        await self._arrived.wait()
        self._arrived.clear()
        output = self._output
        if self._failure is not None and not self.is_finished:
            raise self._failure
        assert output is not None
        if not output.is_finished and len(output.token_ids) > FIRST_TOKENS_UNTHROTTLED:
            self._throttle = self.loop.call_later(MIN_INTERVAL, self._end_throttle, output)
        return output

    def close(self) -> None:
        self._on_finished = lambda: None  # it refers to the sequence, which refers to this
        for timer in (self._timer, self._throttle):
            if timer:
                timer.cancel()

    def _end_throttle(self, seen: Output) -> None:
        self._throttle = None
        if self._output is not seen:
            self._arrived.set()
