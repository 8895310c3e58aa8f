"""The seam to transformers' continuous batching: a batch of sequences, and the thread that runs it.

Everything that this project takes from inside `transformers.generation.continuous_batching` is
named in this file, or beside it in rows.py, cache_salt.py, cpu_attention.py,
prefix_attention.py and contexts.py.
tests/test_seam.py checks each of these names.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from contextlib import nullcontext, suppress
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)
from transformers.utils import is_flash_attn_2_available

from chatglm.engine import cpu_attention
from chatglm.engine.cache_config import WHOLE_PROMPTS, cache_config
from chatglm.engine.cache_salt import salted_id, separate_prefixes
from chatglm.engine.cpu_cache import MemoryOnFirstUse
from chatglm.engine.cpu_glm import FusedGlmMixin
from chatglm.engine.rows import RowExtras, params_of
from chatglm.engine.sequence import LatestOutput, Output, Sequence
from chatglm.hardware.cpu_linear import use_half_weights
from chatglm.sampling import SamplingParams, can_branch, choose, penalise


class Batch:
    """The sequences that run, their KV cache of `num_blocks` blocks of `block_size` tokens, and
    the model thread, which takes all of them a token further in each step."""

    def __init__(
        self,
        model: Any,
        stop_ids: list[int],
        max_running: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        # Sampling is not left to the library: SamplerProcessor chooses, and greedy takes that.
        greedy = GenerationConfig(do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0])
        self._manager = model.init_continuous_batching(greedy, cache_config(model, max_running))
        # Both must be in place before `warmup` builds what refers to them.
        self._router = self._manager.output_router = SequenceRouter()
        self._manager.logit_processor = SamplerProcessor(
            model.config.vocab_size, max_running, model.device, self._router.sequences
        )
        # Under CUDA graphs, which need flash attention, no Python runs in a step.
        self.offers_logprobs = model.device.type == "cpu" or not is_flash_attn_2_available()
        config = self._manager.continuous_batching_config
        if model.device.type == "cpu":
            model.set_attn_implementation(cpu_attention.NAME)
            # The library then passes a block table, as it does to flash attention.
            config.max_blocks_per_request = math.ceil(max_model_len / config.page_size)
            if isinstance(model, FusedGlmMixin):
                model.fuse()
            elif not torch.distributed.is_initialized():
                use_half_weights(model)
        with MemoryOnFirstUse() if model.device.type == "cpu" else nullcontext():
            self._manager.warmup()  # builds the cache now: a lack of memory shows at start-up
        cache = self._manager.batch_processor.cache
        separate_prefixes(cache)
        # A sequence that was paused may come back before the model thread has seen it go.
        self._joins = itertools.count()
        self.block_size: int = config.page_size
        self.num_blocks: int = cache.num_blocks

    @property
    def running(self) -> bool:
        """Whether the model thread is alive and takes sequences."""
        refusal = self._manager.background_thread_status.can_accept_new_requests()
        return self._manager.is_running() and refusal is None

    def start(self) -> None:
        # A thread is a daemon if its starter is: a script that forgets `stop` can still end.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    def stop(self) -> None:
        """Joins the model thread, dead or alive. Sequences that still run get a last output with
        an error."""
        self._manager.stop(block=True, hard_stop=True)
        if self._model.device.type == "cpu":
            self._model.set_attn_implementation("sdpa")

    def add(self, sequence: Sequence) -> bool:
        """Hands it to the model thread. False if that is not able to take it."""
        params, made = sequence.params, sequence.latest.token_ids  # some, after a pause
        sequence.batch_id = salted_id(
            sequence.cache_salt, f"{sequence.request_id}.{next(self._joins)}"
        )
        sequence.resumed_ids = made
        self._router.sequences[sequence.batch_id] = sequence  # first, or an output would be missed
        accepted = self._manager.add_request(
            sequence.input_ids + made,
            request_id=sequence.batch_id,
            max_new_tokens=sequence.max_new_tokens - len(made),
            streaming=True,
            params=params,
            resumed_ids=made,
        )
        if accepted is None:
            del self._router.sequences[sequence.batch_id]
        return accepted is not None

    def remove(self, sequence: Sequence) -> None:
        """Forgets it. If it still runs, it leaves the batch before the next step."""
        del self._router.sequences[sequence.batch_id]
        if not sequence.latest.is_finished:
            self._manager.cancel_request(sequence.batch_id)


class WholePromptScheduler(FIFOScheduler):
    """First come, first served, and a prompt only in a step that can take all of it."""

    NAME = WHOLE_PROMPTS

    def _process_candidates(self, candidates, token_budget, *rest):
        fitting, left = [], token_budget
        for state in candidates:
            is_decoding = state.status == RequestStatus.DECODING
            left -= 1 if is_decoding else len(state.remaining_prefill_tokens)
            if left < 0:  # nobody overtakes it
                break
            fitting.append(state)
        return super()._process_candidates(fitting, token_budget, *rest)


SCHEDULER_MAPPING[WholePromptScheduler.NAME] = WholePromptScheduler


# --- From the model thread to the event loop -----------------------------------------------------


class SequenceRouter(OutputRouter):
    """Puts each of the library's outputs into its sequence's mailbox.

    The loop is woken once a step, for all readers that are due; outputs of sequences that were
    removed are dropped. (The library would keep these in a queue for ever.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.sequences: dict[str, Sequence] = {}  # by batch_id

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        due: dict[asyncio.AbstractEventLoop, list[LatestOutput]] = {}
        for output in outputs:
            sequence = self.sequences.get(output.request_id)
            if sequence is not None and sequence.latest.set(translate(sequence, output)):
                due.setdefault(sequence.latest.loop, []).append(sequence.latest)
        for loop, mailboxes in due.items():
            with suppress(RuntimeError):  # a closed loop has no readers; other loops may have
                loop.call_soon_threadsafe(notify_all, mailboxes)


def translate(sequence: Sequence, output: GenerationOutput) -> Output:
    error, tokens = sequence.failure or output.error, output.generated_tokens
    if sequence.resumed_ids:  # for the library, these belong to the prompt
        tokens = sequence.resumed_ids + tokens
    if output.logprobs and math.isnan(output.logprobs[-1]):  # the mark of SamplerProcessor
        error = "the model's scores are not finite"
    return Output(tokens, output.is_finished(), error)


def notify_all(mailboxes: list[LatestOutput]) -> None:
    for mailbox in mailboxes:
        mailbox.notify()


# --- The sampler, inside a step -------------------------------------------------------------------


class SamplerProcessor(ContinuousBatchingLogitsProcessorList):
    """chatglm.sampling as the one logits processor of the batch: a row per sequence.

    It gives the chosen token log-probability 0 and all others minus infinity, so the library's
    argmax takes it. A row with a NaN or infinity is marked by NaN, which reaches that sequence
    alone, as its token's log-probability. The settings travel in an int32 tensor [7, rows] that
    the library owns, because a CUDA graph replays with what lies there. Floats are stored in it
    bit for bit.
    """

    FLOATS = ("temperature", "top_p", "repetition_penalty", "min_p")
    INTEGERS = ("seed", "top_k")
    # What the library keeps of each request. With several processes it sends this to all of them.
    KEYS = {"params": SamplingParams, "resumed_ids": list}

    def __init__(
        self,
        vocab_size: int,
        max_running: int,
        device: torch.device,
        sequences: dict[str, Sequence] | None = None,
    ) -> None:
        super().__init__(LogitsProcessorList())
        self.supported_keys = dict(self.KEYS)
        # The position comes last.
        self.tensors_required = len(self.FLOATS) + len(self.INTEGERS) + 1
        self.ignored_keys: set[str] = set()
        self.do_processing = True
        self.seen = torch.zeros(max_running, vocab_size, dtype=torch.bool, device=device)
        self.extras = RowExtras(
            vocab_size, max_running, device, {} if sequences is None else sequences
        )
        # Whether a row of this step has the penalty, top_k or min_p. What no row has is left out;
        # a CUDA graph does the same in every step.
        self.penalising = self.truncating = False

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list, arg_storage: torch.Tensor
    ) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        asked = [params_of(state) for state in states]
        floats = torch.tensor([[float(getattr(a, name)) for a in asked] for name in self.FLOATS])
        # position_offset already counts the tokens of this step.
        integers = [[getattr(a, name) for a in asked] for name in self.INTEGERS]
        integers.append([state.position_offset for state in states])
        # A seed has 32 bits and no sign: int64 first, then the lower half of it.
        lower = torch.tensor(integers, dtype=torch.int64).to(torch.int32)
        # One copy to the device: each copy of ordinary memory waits for the one before.
        rows = torch.zeros(self.tensors_required, len(requests_in_batch), dtype=torch.int32)
        rows[: len(self.FLOATS), : len(states)] = floats.view(torch.int32)
        rows[len(self.FLOATS) :, : len(states)] = lower
        arg_storage[:, : len(requests_in_batch)] = rows
        self.penalising = any(a.repetition_penalty != 1.0 for a in asked)
        self.truncating = any(a.top_k or a.min_p for a in asked)
        for row, (state, params) in enumerate(zip(states, asked)):
            if params.repetition_penalty != 1.0:
                self.seen[row] = self._seen_by(state)
        self.extras.prepare(states)
        return arg_storage

    def _seen_by(self, state) -> torch.Tensor:
        """The tokens of prompt and answer, [V]. Kept with the request's settings, so that it is
        freed with the request."""
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
        temperature, top_p, penalty, min_p = args[: len(self.FLOATS)].view(torch.float32)
        seed, top_k, position = args[len(self.FLOATS) :].long()
        raw_scores, is_capturing = scores, not can_branch(scores.device)
        if self.penalising or is_capturing:
            penalty = torch.where(penalty > 0, penalty, 1.0)  # rows that only prefill have 0
            scores = penalise(scores, self.seen[: len(scores)], penalty)
        scores = self.extras.add_biases(scores)
        limits = (top_k, min_p) if self.truncating or is_capturing else ()
        token = choose(scores, temperature, top_p, seed & 0xFFFFFFFF, position, *limits)
        self.extras.record(raw_scores, token)
        # The sum is not finite if one score is not. Adding is ten times faster than `isfinite`.
        mark = torch.where(torch.isfinite(scores.sum(dim=-1)), 0.0, torch.nan)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], mark[:, None])
