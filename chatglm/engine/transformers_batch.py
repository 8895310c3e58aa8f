"""The seam to transformers' continuous batching: a batch of sequences, and the thread that runs it.

Everything that this project takes from inside `transformers.generation.continuous_batching` is
named in this file, or beside it in transformers_sampler.py, rows.py, cpu_attention.py,
prefix_attention.py and contexts.py. tests/test_seam.py checks each of these names.
"""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)
from transformers.utils import is_flash_attn_2_available

from chatglm.engine import cpu_attention
from chatglm.engine.cpu_cache import MemoryOnFirstUse
from chatglm.engine.cpu_glm import FusedGlmMixin
from chatglm.engine.sequence import LatestOutput, Output, Sequence
from chatglm.engine.transformers_sampler import SamplerProcessor
from chatglm.hardware.device import free_memory
from chatglm.sampling import DEFAULT_MAX_LENGTH

BLOCK_SIZE = 32  # tokens in a block of the KV cache: prefixes are shared by whole blocks
CPU_CACHE_SHARE = 0.4  # of the free host memory, the most that the KV cache may take
CPU_BATCH_TOKENS = 512  # prompt tokens per step: a long prompt must not hold up the others
# On a GPU more are needed to keep it busy. But SDPA's mask takes this many numbers for each token
# of the cache: with the library's 8192, a quarter of the memory that the cache could have.
CUDA_BATCH_TOKENS = 2048


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
        with MemoryOnFirstUse() if model.device.type == "cpu" else nullcontext():
            self._manager.warmup()  # builds the cache now: a lack of memory shows at start-up
        self.block_size: int = config.page_size
        self.num_blocks: int = self._manager.batch_processor.cache.num_blocks

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
        sequence.batch_id = f"{sequence.request_id}.{len(made)}"
        sequence.resumed_ids = made
        self._router.sequences[sequence.batch_id] = sequence  # first, or an output would be missed
        accepted = self._manager.add_request(
            sequence.input_ids + made,
            request_id=sequence.batch_id,
            max_new_tokens=sequence.max_new_tokens - len(made),
            streaming=True,
            temperature=float(params.temperature),
            top_p=float(params.top_p),
            repetition_penalty=float(params.repetition_penalty),
            min_p=float(params.min_p),
            seed=params.seed,
            top_k=params.top_k,
            has_bias=params.has_bias,
            has_logprobs=params.logprobs is not None,
        )
        if accepted is None:
            del self._router.sequences[sequence.batch_id]
        return accepted is not None

    def remove(self, sequence: Sequence) -> None:
        """Forgets it. If it still runs, it leaves the batch before the next step."""
        del self._router.sequences[sequence.batch_id]
        if not sequence.latest.is_finished:
            self._manager.cancel_request(sequence.batch_id)


def cache_config(model: PreTrainedModel, max_running: int) -> ContinuousBatchingConfig:
    """The KV cache and the batch. A GPU's cache takes what memory there is; in host memory it
    takes what `max_running` conversations of DEFAULT_MAX_LENGTH tokens need."""
    settings: dict = dict(
        max_requests_per_batch=max_running,
        return_logprobs=True,
        use_async_batching=False,
        max_memory_percent=0.8,
    )
    if model.device.type == "cuda":
        settings |= dict(max_batch_tokens=CUDA_BATCH_TOKENS)
    is_half = model.dtype in (torch.bfloat16, torch.float16)  # flash attention has no float32
    whole_prompts = getattr(model, "sees_prompt_whole", False)
    if whole_prompts:
        # Each token of a prompt depends on all of it, so a prompt that begins alike shares nothing.
        longest = model.config.max_position_embeddings
        settings |= dict(
            allow_block_sharing=False,
            scheduler_type=WholePromptScheduler.NAME,
            max_batch_tokens=longest + max_running,
        )
    elif model.device.type == "cuda" and is_half and is_flash_attn_2_available():
        return ContinuousBatchingConfig(**settings)  # flash attention needs its own block size
    # auto_switch_to_flash would download a flash attention from the model hub.
    settings |= dict(page_size=BLOCK_SIZE, auto_switch_to_flash=False)
    if model.device.type == "cpu":
        config = model.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        block_bytes = BLOCK_SIZE * numbers * model.dtype.itemsize  # keys and values
        affordable = int(CPU_CACHE_SHARE * free_memory(model.device) / block_bytes)
        wanted = max_running * (DEFAULT_MAX_LENGTH // BLOCK_SIZE + 1)
        settings |= dict(num_blocks=max(2, min(wanted, affordable)))
        settings.setdefault("max_batch_tokens", CPU_BATCH_TOKENS)
    return ContinuousBatchingConfig(**settings)


class WholePromptScheduler(FIFOScheduler):
    """First come, first served, and a prompt only in a step that can take all of it."""

    NAME = "whole_prompts"

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
            loop.call_soon_threadsafe(notify_all, mailboxes)


def translate(sequence: Sequence, output: GenerationOutput) -> Output:
    error, tokens = output.error, output.generated_tokens
    if sequence.resumed_ids:  # for the library, these belong to the prompt
        tokens = sequence.resumed_ids + tokens
    if output.logprobs and math.isnan(output.logprobs[-1]):  # the mark of SamplerProcessor
        error = "the model's scores are not finite"
    return Output(tokens, output.is_finished(), error)


def notify_all(mailboxes: list[LatestOutput]) -> None:
    for mailbox in mailboxes:
        mailbox.notify()
