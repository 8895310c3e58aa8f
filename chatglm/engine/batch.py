"""From the thread that runs the model to the event loop: what is new of each answer.

While Python runs on the event loop, the thread of the model waits for the interpreter. So a
reader is woken for the first few tokens as they come, then at most 25 times a second, which looks
smooth, and for the last; and the thread rouses the loop only in a step in which some reader is to
be woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import is_flash_attn_2_available

from chatglm.hardware.device import free_memory
from chatglm.sampling import choose, penalise

CPU_CACHE_SHARE = 0.4  # of the free host memory, the most that the key/value cache may take
CPU_BATCH_TOKENS = 512  # prompt tokens a step takes in: a long prompt must not hold up the others
PAGE = 32  # tokens in a page of the cache: prefixes are shared by whole pages
PAUSE = 0.04  # seconds from one chunk to the next, at least
UNHURRIED = 8  # tokens that come without a pause


class Newest:
    """What the thread has last reported of a request, for its reader; older reports are lost, but
    each holds all the tokens. After `timeout` seconds there is only TimeoutError."""

    _resting: asyncio.TimerHandle | None = None  # from one chunk to the next

    def __init__(self, timeout: float | None, at_last: Callable[[], None]) -> None:
        self._output: GenerationOutput | None = None
        self._at_last, self._is_late, self._arrived = at_last, False, asyncio.Event()
        # One timer for all: asyncio.timeout() around each wait would take as long as the wait.
        self.loop = asyncio.get_running_loop()
        self._timer = self.loop.call_later(timeout, self._expire) if timeout else None

    @property
    def is_last(self) -> bool:
        return self._output is not None and self._output.is_finished()

    def put(self, output: GenerationOutput) -> bool:
        """From the thread, once a step. Whether `wake` is to be called on the loop."""
        self._output = output  # first: who ends a rest looks whether there is another by then
        return self._resting is None or output.is_finished()

    def wake(self) -> None:
        if self.is_last:  # a reader that reads no more must not keep others out
            self._at_last()
        self._arrived.set()

    async def get(self) -> GenerationOutput:
        await self._arrived.wait()
        self._arrived.clear()
        output = self._output
        if self.is_last:
            return self._output
        if self._is_late:
            raise TimeoutError
        if len(output.generated_tokens) > UNHURRIED:
            self._resting = self.loop.call_later(PAUSE, self._rested, output)
        return output

    def close(self) -> None:
        for timer in (self._timer, self._resting):
            if timer:
                timer.cancel()

    def _rested(self, read: GenerationOutput) -> None:
        self._resting = None
        if self._output is not read:
            self._arrived.set()

    def _expire(self) -> None:
        self._is_late = True
        self._arrived.set()


class Router(OutputRouter):
    """Hands each of the thread's outputs to its reader; what has none any more is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, Newest] = {}  # by request id

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        due: dict[asyncio.AbstractEventLoop, list[Newest]] = {}
        for output in outputs:
            reader = self.readers.get(output.request_id)
            if reader is not None and reader.put(output):
                due.setdefault(reader.loop, []).append(reader)
        for loop, readers in due.items():
            loop.call_soon_threadsafe(wake_all, readers)


def wake_all(readers: list[Newest]) -> None:
    for reader in readers:
        reader.wake()


class Sampler(ContinuousBatchingLogitsProcessorList):
    """All of the above as the one logits processor of a continuous batch.

    It marks the chosen token by probability 1, so the batch's own argmax takes it, and a row with
    a NaN or infinity by NaN, which reaches that request alone, as its token's log-probability.
    Settings travel in a row each of an int32 tensor that the batch keeps (a CUDA graph replays
    with what lies there); floats lie in it bit for bit.
    """

    do_processing = True
    FLOATS = ("temperature", "top_p", "repetition_penalty")
    tensors_required = len(FLOATS) + 2  # and the seed, and the position

    def __init__(self, vocab_size: int, max_requests: int, device: torch.device) -> None:
        self.supported_keys = {**dict.fromkeys(self.FLOATS, float), "seed": int}
        self.ignored_keys = set()
        self.seen = torch.zeros(max_requests, vocab_size, dtype=torch.bool, device=device)
        self.penalising = False  # whether a request of this step has a penalty; used on a CPU only

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list, arg_storage: torch.Tensor
    ) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        settings = [state.logit_processor_kwargs for state in states]
        floats = torch.tensor([[s[name] for s in settings] for name in self.FLOATS])
        # A seed has 32 bits and no sign; position_offset already counts the tokens of this step.
        integers = torch.tensor(
            [[s["seed"] for s in settings], [state.position_offset for state in states]],
            dtype=torch.int64,
        )
        arg_storage[:, : len(requests_in_batch)] = 0
        arg_storage[:3, : len(states)] = floats.view(torch.int32).to(arg_storage.device)
        arg_storage[3:, : len(states)] = integers.to(torch.int32).to(arg_storage.device)
        self.penalising = any(s["repetition_penalty"] != 1.0 for s in settings)
        for row, state in enumerate(states):
            if state.logit_processor_kwargs["repetition_penalty"] != 1.0:
                self.seen[row] = self._seen_by(state)
        return arg_storage

    def _seen_by(self, state) -> torch.Tensor:
        """The tokens of prompt and answer, [V]. Kept with the request, and gone with it."""
        seen = state.logit_processor_kwargs.get("seen")
        if seen is None:
            seen = torch.zeros(self.seen.shape[1], dtype=torch.bool, device=self.seen.device)
            seen[torch.tensor(state.initial_tokens, device=seen.device)] = True
            state.logit_processor_kwargs["seen"] = seen
        if state.generated_tokens:
            seen[state.generated_tokens[-1]] = True
        return seen

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor
    ) -> torch.Tensor:
        temperature, top_p, penalty = args[:3].view(torch.float32)
        seed, position = args[3:].long()
        if self.penalising or scores.device.type != "cpu":
            penalty = torch.where(penalty > 0, penalty, 1.0)  # rows that only prefill have 0
            scores = penalise(scores, self.seen[: len(scores)], penalty)
        token = choose(scores, temperature, top_p, seed & 0xFFFFFFFF, position)
        # A sum is finite if all in it are, and takes a tenth of the time of a look at each.
        mark = torch.where(torch.isfinite(scores.sum(dim=-1)), 0.0, torch.nan)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], mark[:, None])


def cache_config(
    model: PreTrainedModel, max_requests: int, tokens_each: int
) -> ContinuousBatchingConfig:
    """The key/value cache and the batch: as large as a GPU allows; in host memory, what
    `max_requests` of `tokens_each` tokens need."""
    settings = dict(
        max_requests_per_batch=max_requests,
        return_logprobs=True,
        use_async_batching=False,
        max_memory_percent=0.8,
    )
    if model.device.type == "cuda" and is_flash_attn_2_available():
        return ContinuousBatchingConfig(**settings)  # flash attention wants its own page size
    # auto_switch_to_flash would fetch a flash attention from the hub by itself.
    settings |= dict(page_size=PAGE, auto_switch_to_flash=False)
    if model.device.type == "cpu":
        config = model.config
        page_bytes = (
            2
            * PAGE
            * config.num_key_value_heads
            * config.head_dim
            * config.num_hidden_layers
            * model.dtype.itemsize
        )
        affordable = int(CPU_CACHE_SHARE * free_memory(model.device) / page_bytes)
        wanted = max_requests * (tokens_each // PAGE + 1)
        settings |= dict(
            num_blocks=max(2, min(wanted, affordable)), max_batch_tokens=CPU_BATCH_TOKENS
        )
    return ContinuousBatchingConfig(**settings)
