"""Many conversations at once, over transformers' continuous batching.

One thread runs the model: each step takes every request under way one token further, and lets
new ones join. The event loop submits requests and reads tokens; it never waits for the model.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, closing

from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from chatglm.engine import cpu_attention, cpu_glm
from chatglm.engine.admission import Places, Ticket
from chatglm.engine.batch import Newest, Router, Sampler, cache_config
from chatglm.engine.sequence import Chunk, Report, Request, finish_reason
from chatglm.errors import EngineError
from chatglm.hardware.tensor_parallel import broadcast_from_rank0
from chatglm.hardware.threads import install_thread_policy, single_threaded
from chatglm.text.detokenizer import Detokenizer
from chatglm.text.messages import extend_history, to_messages

logger = logging.getLogger("chatglm")

MAX_LENGTH = 2048  # tokens of prompt and answer, where a request does not say


class Engine:
    """Serves many conversations with one model, from one event loop.

    `active` requests are being generated, `waiting` ones wait for a place: at most
    `max_concurrency` run at once, and only as many as the key/value cache can hold to their end;
    at most `max_waiting` wait. No answer takes longer than `timeout` seconds, once it has a place,
    or more than `max_length` tokens with its prompt, if these are given.
    """

    def __init__(
        self,
        tokenizer,
        model,
        max_concurrency: int = 64,
        max_waiting: int = 256,
        max_length: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.max_concurrency, self.timeout = max_concurrency, timeout
        self.longest = min(max_length or math.inf, model.config.max_position_embeddings)
        self._places = Places(max_concurrency, max_waiting)
        self._manager = None
        self._page = 0  # tokens in a page of the cache
        self._ids = itertools.count()
        self._stopping = False
        self.context = self.longest  # tokens; less if the cache is smaller

    # 1. Start and stop

    @property
    def active(self) -> int:
        return self._places.active

    @property
    def waiting(self) -> int:
        return len(self._places.queue)

    @property
    def running(self) -> bool:
        """Whether the thread is alive and takes requests."""
        manager = self._manager
        return (
            manager is not None
            and manager.is_running()
            and manager.background_thread_status.can_accept_new_requests() is None
        )

    def start(self) -> None:
        """Allocates the cache and starts the thread; after its death, both anew."""
        if self.running:
            return
        self._end_thread()
        self._stopping = False
        install_thread_policy(self.model)
        with (
            single_threaded()
        ):  # but the thread is none of it, and has what torch is told otherwise
            self._manager = self._make_manager()
        # A thread is a daemon if its starter is: a script that forgets `stop` can still end.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    def _make_manager(self):
        """The library's manager of a batch, with its cache; its thread does not run yet."""
        self.max_concurrency, self.longest = broadcast_from_rank0(
            self.max_concurrency, self.longest
        )
        model, stop_ids = self.model, self.tokenizer.stop_ids
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0]),
            cache_config(model, self.max_concurrency, MAX_LENGTH),
        )
        manager.output_router = Router()
        manager.logit_processor = Sampler(
            model.config.vocab_size, self.max_concurrency, model.device
        )
        config = manager.continuous_batching_config
        if model.device.type == "cpu":
            model.set_attn_implementation(cpu_attention.NAME)  # finds pages itself, as flash does
            config.max_blocks_per_request = math.ceil(self.longest / config.page_size)
            cpu_glm.use_fused_forward(model)
        manager.warmup()  # builds the cache here, so that a lack of memory shows at start-up
        self._page = config.page_size
        self._places.pages = manager.batch_processor.cache.num_blocks
        self.context = min(self.longest, (self._places.pages - 1) * self._page)
        return manager

    def stop(self) -> None:
        """Ends the thread after its current step; answers under way end as `cancelled`."""
        self._stopping = True
        self._end_thread()

    def _end_thread(self) -> None:
        """Joins the thread, if there is one, dead or alive, and frees its cache."""
        if self._manager is not None:
            self._manager.stop(block=True, hard_stop=True)
            self._manager = None
        if self.model.config._attn_implementation == cpu_attention.NAME:
            self.model.set_attn_implementation("sdpa")

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # 2. A request's way: prepare, wait for a place, stream

    def prepare(
        self,
        messages: list[dict],
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        top_p: float = 0.7,
        temperature: float = 0.95,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        beginning: str = "",
    ) -> Request:
        """Checks and tokenises. Any thread may call it.

        `max_length` counts prompt and answer, `max_new_tokens` the answer alone; the smaller
        bound holds, and the model's context anyway. The answer goes on from `beginning`, such as
        the name of a tool that must be called. Raises ValueError if nothing fits.
        """
        input_ids = self.tokenizer.encode_chat(messages)
        if beginning:
            input_ids += self.tokenizer.encode(beginning)
        if max_length is None:
            max_length = MAX_LENGTH if max_new_tokens is None else self.context
        room = min(max_length, self.context) - len(input_ids)
        if room < 1:
            # The client looks for "leaves no room", and drops old turns then.
            raise ValueError(
                f"max_length {min(max_length, self.context)} leaves no room: prompt "
                f"and history take {len(input_ids)} tokens; shorten the history"
                + (", or raise max_length" if max_length < self.context else "")
            )
        seed = random.getrandbits(32) if seed is None else seed
        if max_new_tokens is not None:
            room = min(room, max_new_tokens)
        return Request(
            input_ids,
            room,
            float(temperature),
            float(top_p),
            float(repetition_penalty),
            seed,
            beginning,
        )

    async def generate(self, messages: list[dict], **settings) -> AsyncIterator[Chunk]:
        """Chunks of the answer, each the whole text so far; the settings are `prepare`'s."""
        async with aclosing(self.stream(self.prepare(messages, **settings))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stream_chat(
        self, prompt: str, history: list | None = None, **settings
    ) -> AsyncIterator[tuple[str, list]]:
        """(text so far, history with it), as the published `stream_chat`, for many at once."""
        async with aclosing(self.generate(to_messages(prompt, history), **settings)) as chunks:
            async for chunk in chunks:
                yield chunk.text, extend_history(history, prompt, chunk.text)

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Chunks of the answer. Closing the iterator cancels the request, wherever it is.

        The first chunk comes at once, without text, and the last has a `finish_reason`. Not every
        step has one: 25 a second come at most, and to a slow reader the newest. Raises QueueFull
        before the first, and EngineError there or after a last chunk of `error` or `cancelled`.
        """
        self._keep_running()
        ticket = self._places.enter(self._pages_for(request))
        report = Report(f"request-{next(self._ids)}", len(request.input_ids))
        try:
            yield Chunk("", "", report.prompt_tokens, 0)
            await ticket.turn
            async with aclosing(self._outputs(request, report.id, ticket)) as outputs:
                detokenizer = Detokenizer(self.tokenizer.decode_raw, self.tokenizer.anchor)
                async for output in outputs:
                    yield self._chunk(request, output, detokenizer, report)
                    if report.reason == "error":
                        self._keep_running()  # if it was the thread that died
                    if report.reason in ("error", "cancelled"):
                        raise EngineError(f"the answer was broken off ({report.reason})")
        except TimeoutError as error:
            report.reason = "timeout"
            raise EngineError(f"the answer took more than {self.timeout:g} s") from error
        finally:
            self._places.leave(ticket)
            logger.info("%s", report)

    def _chunk(
        self, request: Request, output: GenerationOutput, detokenizer: Detokenizer, report: Report
    ) -> Chunk:
        tokens, stop_ids = output.generated_tokens, self.tokenizer.stop_ids
        ended = bool(tokens) and tokens[-1] in stop_ids
        detokenizer.push(tokens[report.count : len(tokens) - ended])
        report.reason = finish_reason(output, report.count, stop_ids, self._stopping)
        report.token(len(tokens))
        raw = request.beginning + (detokenizer.finish() if report.reason else detokenizer.text)
        return Chunk(
            self.tokenizer.visible(raw, finished=bool(report.reason)),
            raw,
            report.prompt_tokens,
            report.count,
            report.reason,
        )

    async def _outputs(
        self, request: Request, request_id: str, ticket: Ticket
    ) -> AsyncIterator[GenerationOutput]:
        """What the thread reports of a request, the newest only. Raises TimeoutError."""
        with closing(Newest(self.timeout, lambda: self._places.leave(ticket))) as newest:
            manager = self._submit(request, request_id, newest)
            try:
                while True:
                    yield (output := await newest.get())  # the reader may take its time
                    if output.is_finished():
                        return
            finally:
                del manager.output_router.readers[request_id]
                if not newest.is_last:
                    manager.cancel_request(request_id)

    def _submit(self, request: Request, request_id: str, newest: Newest):
        """Hands the request to the thread, to a new one if that has died. Returns its manager."""
        for _ in range(2):
            self._keep_running()
            manager = self._manager
            manager.output_router.readers[request_id] = newest  # first, or a token is missed
            accepted = manager.add_request(
                request.input_ids,
                request_id=request_id,
                max_new_tokens=request.max_new_tokens,
                streaming=True,
                temperature=request.temperature,
                top_p=request.top_p,
                repetition_penalty=request.repetition_penalty,
                seed=request.seed,
            )
            if accepted is not None:
                return manager
        raise EngineError("the model is not able to answer now")

    def _pages_for(self, request: Request) -> int:
        """Pages of the cache that the request may fill to its end, and one it may share."""
        pages = math.ceil((len(request.input_ids) + request.max_new_tokens) / self._page) + 1
        if pages > self._places.pages:  # prepared before a restart that found less memory
            raise EngineError("the key/value cache is too small for this request")
        return pages

    def _keep_running(self) -> None:
        """Starts the thread where it is not yet, or no longer, alive."""
        if self._stopping:
            raise EngineError("the engine is stopped")
        self.start()
