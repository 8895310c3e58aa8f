"""Many conversations at once: the public class.

    event loop (the server's thread)               model thread
    ────────────────────────────────               ────────────
    prepare   check, tokenise (any thread)
    submit    queue, wait for a place      ──▶     step: one forward pass of the network
              in the KV cache                        · prefill: prompts that joined, 512 tokens
                                                       at a time on a CPU
    generate  detokenise, yield a chunk    ◀──         · decode: one token for every sequence
    close     cancel                       ──▶       · sequences that ended or were cancelled leave

The loop never waits for the model (except to start it anew), and the model never waits for a
reader: between them lies a mailbox per sequence that keeps the newest output only.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from torch.utils.hooks import RemovableHandle

from chatglm.engine.queue import AdmissionQueue
from chatglm.engine.sequence import Chunk, LatestOutput, Output, Sequence
from chatglm.engine.statistics import EngineStatistics, RequestStats
from chatglm.engine.transformers_batch import Batch
from chatglm.errors import AnswerEnded, EngineError
from chatglm.hardware.tensor_parallel import broadcast_from_rank0
from chatglm.hardware.threads import install_thread_policy, single_threaded
from chatglm.sampling import SamplingParams, check_params, check_room
from chatglm.text.constraint import GrammarCompiler
from chatglm.text.continuation import HIDDEN_TOKENS, AnswerText, check_length, encode_prompt
from chatglm.text.forms import AnswerForm
from chatglm.text.messages import extend_history, to_messages
from chatglm.text.tools import published_response, tool_names

logger = logging.getLogger("chatglm")


class Engine:
    """Serves many conversations with one model, from one event loop.

    `active` requests are being generated, `waiting` ones are queued: at most `max_concurrency`
    run at once, and as many as the KV cache can hold to their end; about `max_waiting` may wait.
    `timeout` limits the seconds of an answer once it runs, `max_length` its tokens with the prompt.
    With `separate_caches`, a client's cached prefixes are of no use to others.
    """

    def __init__(
        self,
        tokenizer,
        model,
        max_concurrency: int = 64,
        max_waiting: int = 256,
        max_length: int | None = None,
        timeout: float | None = None,
        separate_caches: bool = False,
    ) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.max_concurrency, self.timeout = max_concurrency, timeout
        self.separate_caches = separate_caches
        context = model.config.max_position_embeddings
        self.max_model_len: int = min(max_length or context, context)  # tokens
        self.max_request_tokens = self.max_model_len  # less if the KV cache is smaller
        self._admission = AdmissionQueue(
            max_concurrency, max_waiting, self._join_batch, self._leave_batch
        )
        self.statistics = EngineStatistics()
        self._compiler = GrammarCompiler(tokenizer, model.config.vocab_size)
        self._batch: Batch | None = None
        self._thread_policy: RemovableHandle | None = None
        self._request_numbers = itertools.count()
        self._stopping = False

    # 1. Start and stop

    @property
    def active(self) -> int:
        return len(self._admission.running)

    @property
    def waiting(self) -> int:
        return len(self._admission.waiting)

    @property
    def cache_usage(self) -> float:
        """The share of the KV cache that is reserved for those who run, from 0 to 1."""
        return self._admission.reserved_blocks / max(1, self._admission.num_blocks)

    @property
    def running(self) -> bool:
        """Whether the model thread is alive and takes requests."""
        return self._batch is not None and self._batch.running

    def start(self) -> None:
        """Allocates the KV cache and starts the model thread. Does both again if it died."""
        if self.running:
            return
        self._end_batch()
        self._stopping = False
        self.max_concurrency, self.max_model_len = broadcast_from_rank0(
            self.max_concurrency, self.max_model_len
        )
        self._thread_policy = install_thread_policy(self.model)
        # Single-threaded while the cache is built. The model thread starts after this block and
        # gets torch's usual number of threads.
        with single_threaded():
            self._batch = Batch(
                self.model, self.tokenizer.stop_ids, self.max_concurrency, self.max_model_len
            )
        self._admission.resize(self._batch.num_blocks)
        # One block stays free: a sequence may share its first block with another.
        usable_tokens = (self._batch.num_blocks - 1) * self._batch.block_size
        self.max_request_tokens = min(self.max_model_len, usable_tokens)
        self._batch.start()

    def stop(self) -> None:
        """Ends the model thread after its current step. Answers under way raise EngineError."""
        self._stopping = True
        self._end_batch()

    def _end_batch(self) -> None:
        """Joins the model thread, dead or alive, and frees the KV cache."""
        if self._batch is not None:
            self._batch.stop()
            self._batch = None
        if self._thread_policy is not None:
            self._thread_policy.remove()
            self._thread_policy = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # 2. The way of a request: prepare, submit, read chunks

    def prepare(
        self,
        prompt: list[dict] | str,
        params: SamplingParams | None = None,
        form: AnswerForm | None = None,
    ) -> Sequence:
        """Checks and tokenises messages, or a text to go on with. Any thread may call it.

        Without any limit in `params`, the answer may fill the context. It has the `form`, such as
        JSON or a call of a tool, and continues the last message, if that is the assistant's. Raises
        PromptTooLong if no token is left for the answer, InvalidField for a form that cannot be
        kept, and ValueError for messages that cannot be encoded.
        """
        params = params or SamplingParams()
        offers_logprobs = self._batch is None or self._batch.offers_logprobs
        check_params(params, self.model.config.vocab_size, offers_logprobs)
        context = self.max_request_tokens
        max_length = context if params.max_length is None else params.max_length
        check_length(self.tokenizer, prompt, max_length, context)
        forced_prefix = form.prefix(self.tokenizer) if form else ""
        input_ids, prefix, begun = encode_prompt(self.tokenizer, prompt, forced_prefix)
        limits = [check_room(len(input_ids), max_length, context), params.max_new_tokens]
        if params.max_visible_tokens is not None:
            limits.append(params.max_visible_tokens + HIDDEN_TOKENS)
        max_new_tokens = min(limit for limit in limits if limit is not None)
        constraint = self._compiler.compile(form, prefix[len(prefix) - begun :])
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(32))
        plain = isinstance(prompt, str)
        return Sequence(input_ids, max_new_tokens, params, prefix, begun, plain, constraint)

    async def submit(self, sequence: Sequence, client: str = "") -> AsyncGenerator[Chunk, None]:
        """Queues it, and returns the chunks of its answer. Raises QueueFull, or EngineError.

        Each chunk holds the whole text so far; the last has a `finish_reason`. Not every step has
        a chunk: at most 25 come a second, and a slow reader gets the newest. If there will be no
        whole answer, the generator raises EngineError. Closing it cancels the request, whether it
        waits or runs; throwing AnswerEnded into it ends the answer as it is. Requests with the same
        `client`, a name of any kind, share one share of the places.
        """
        sequence.client = client
        sequence.cache_salt = client if self.separate_caches else ""
        chunks = self._run(sequence)
        # Runs it up to its first yield: only a generator that has started runs its `finally`
        # when it is closed, or dropped.
        await anext(chunks)
        return chunks

    async def generate(self, prompt: list[dict] | str, **params) -> AsyncGenerator[Chunk, None]:
        """Chunks of the answer; `params` are the fields of SamplingParams."""
        sequence = self.prepare(prompt, SamplingParams(**params))
        async with aclosing(await self.submit(sequence)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stream_chat(
        self, prompt: str, history: list | None = None, **params
    ) -> AsyncGenerator[tuple[str | dict, list], None]:
        """(text so far, history with it), as the published `stream_chat`, for many at once."""
        conversation = to_messages(prompt, history)
        async with aclosing(self.generate(conversation, **params)) as chunks:
            async for chunk in chunks:
                names = tool_names(conversation) if chunk.finish_reason else []  # of whole calls
                response, messages = published_response(chunk.raw, chunk.text, names)
                yield response, extend_history(history, prompt, messages)

    async def _run(self, sequence: Sequence) -> AsyncGenerator[Chunk, None]:
        self._keep_running()
        self._enqueue(sequence)
        try:
            yield Chunk("", "", 0, 0)  # queued; `submit` takes this one
            text = AnswerText(self.tokenizer, sequence)
            while sequence.stats.finish_reason is None:
                yield self._chunk(sequence, await sequence.latest.next(), text)
        except EngineError as error:
            sequence.stats.finish_reason = error.finish_reason
            raise
        except AnswerEnded:
            sequence.stats.finish_reason = "stop"
        finally:
            sequence.latest.close()
            self._leave_batch(sequence)
            self._admission.release(sequence)
            self.statistics.finish(sequence.stats)

    def _enqueue(self, sequence: Sequence) -> None:
        assert self._batch is not None
        sequence.request_id = request_id = f"request-{next(self._request_numbers)}"
        sequence.stats = RequestStats(request_id, len(sequence.input_ids), sequence.trace_id)
        # The place is given back with the last token, even if its reader has stopped reading.
        sequence.latest = LatestOutput(lambda: self._admission.release(sequence))
        tokens = len(sequence.input_ids) + sequence.max_new_tokens
        # One block more: the first may be shared with a sequence that begins alike.
        sequence.num_blocks = math.ceil(tokens / self._batch.block_size) + 1
        self._admission.enqueue(sequence)

    # 3. What the admission queue calls

    def _join_batch(self, sequence: Sequence) -> None:
        """Hands it to the model thread: to a new one if that has died."""
        if self.timeout:
            sequence.latest.limit_time(self.timeout)
        try:
            for _ in range(2):
                self._keep_running()
                assert self._batch is not None
                if self._batch.add(sequence):
                    sequence.batch = self._batch
                    return
            raise EngineError("the model is not able to answer now")
        except EngineError as error:
            sequence.latest.fail(error)

    def _leave_batch(self, sequence: Sequence) -> None:
        if sequence.batch is not None:
            sequence.batch.remove(sequence)
            sequence.batch = None

    # 4. From tokens to text

    def _chunk(self, sequence: Sequence, output: Output, text: AnswerText) -> Chunk:
        """The answer so far, told by `output`. Raises EngineError if it failed."""
        if output.error is not None:
            if self._stopping:
                raise EngineError("the engine was stopped", "cancelled")
            logger.error("%s: %s", sequence.request_id, output.error)
            self._keep_running()  # if it was the model thread that died
            raise EngineError(sequence.failure or "the model failed; the answer is broken off")
        stats, params = sequence.stats, sequence.params
        tokens, is_finished = output.token_ids, output.is_finished
        if stats.hidden_tokens is None:
            stats.hidden_tokens = text.hidden_tokens(tokens)
        hidden = len(tokens) if stats.hidden_tokens is None else stats.hidden_tokens
        if stats.hidden_tokens is not None and params.max_visible_tokens is not None:
            limit = hidden + params.max_visible_tokens
            tokens, is_finished = tokens[:limit], is_finished or len(tokens) >= limit
        stopped = bool(tokens) and tokens[-1] in self.tokenizer.stop_ids
        text.push(tokens[stats.completion_tokens : len(tokens) - stopped])
        self.statistics.count(stats, len(tokens))
        if is_finished:
            stats.finish_reason = "stop" if stopped and not sequence.is_cut else "length"
        raw, visible = text.so_far(is_finished)
        logprobs = sequence.logprobs_of(range(hidden, len(tokens) - stopped))
        counts = stats.prompt_tokens, len(tokens)
        return Chunk(visible, raw, *counts, stats.finish_reason, hidden, logprobs)

    def _keep_running(self) -> None:
        """Starts the model thread if it is not, or no longer, alive."""
        if self._stopping:
            raise EngineError("the engine is stopped", "cancelled")
        self.start()
