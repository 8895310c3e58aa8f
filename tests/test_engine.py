"""Many conversations at once, each compared with the same request alone or with `generate`."""

import asyncio
import random
import threading
import time
from contextlib import aclosing, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import chatglm
from chatglm import SamplingParams
from chatglm.engine.sequence import FIRST_TOKENS_UNTHROTTLED, MIN_INTERVAL, LatestOutput, Output
from chatglm.text.continuation import check_length
from chatglm.text.messages import to_messages
from tests.servers import LIMIT

GOLDEN = Path(__file__).parent / "golden" / "chatglm3"
ENDLESS = dict(temperature=0, max_length=1000)  # what this model answers 你好 with, it never ends
QUESTIONS = ["你好", "什么是流式输出？", "Tell me about FastAPI 🚀", "hi", "a b c", "第二轮"]


@pytest.fixture(scope="module")
def loaded():
    return chatglm.load(GOLDEN, device="cpu")


@pytest.fixture
def engine(loaded):
    with chatglm.Engine(*loaded) as engine:
        yield engine


async def last(engine, question, **settings):
    async for chunk in engine.generate(to_messages(question), **settings):
        pass
    return chunk


@contextmanager
def held(model):
    """Meanwhile the model makes only the steps that are let through: `with held(model) as let`."""
    steps = threading.Semaphore(0)

    def wait(*_):
        steps.acquire(timeout=LIMIT)

    hook = model.model.embed_tokens.register_forward_pre_hook(wait)
    try:
        yield steps.release
    finally:
        hook.remove()
        steps.release()  # the one that waits


async def until(condition):
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.01)


def is_empty(engine) -> bool:
    """Nothing is left of any request: no place, no page, no state, no handler."""
    scheduler = engine._batch._manager.batch_processor.scheduler
    return not (
        engine.active
        or engine.waiting
        or engine._admission.reserved_blocks
        or scheduler.active_requests
        or scheduler.waiting_requests
        or engine._batch._manager.output_router.sequences
    )


def generate(loaded, question: str, tokens: int, **settings) -> str:
    """What transformers' own `generate` answers, greedily."""
    tokenizer, model = loaded
    ids = tokenizer.encode_chat(to_messages(question))
    out = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        eos_token_id=tokenizer.stop_ids,
        **settings,
    )[0, len(ids) :].tolist()
    detokenizer = tokenizer.detokenizer()
    detokenizer.push([i for i in out if i not in tokenizer.stop_ids])
    return detokenizer.finish()


def test_greedy_answers_equal_generate(engine, loaded):
    for question in QUESTIONS:
        chunk = asyncio.run(last(engine, question, temperature=0, max_new_tokens=30))
        assert chunk.raw == generate(loaded, question, 30)


def test_layers_that_look_back_only_so_far_answer_as_in_generate(loaded):
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=loaded[1].config.vocab_size,
            hidden_size=64,
            intermediate_size=96,
            head_dim=16,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    )
    questions = [word * times for word, times in zip(QUESTIONS, (1, 30, 60, 200))]

    async def together(engine):
        return await asyncio.gather(
            *(last(engine, question, temperature=0, max_new_tokens=20) for question in questions)
        )

    with chatglm.Engine(loaded[0], model.eval()) as engine:
        chunks = asyncio.run(together(engine))
    assert [c.raw.strip() for c in chunks] == [
        generate((loaded[0], model), q, 20) for q in questions
    ]


def test_half_precision_answers_alone_and_in_a_crowd():
    tokenizer, model = chatglm.load(GOLDEN, device="cpu", dtype="bfloat16")

    async def together(engine):
        return await asyncio.gather(
            *(
                last(engine, question * 40, temperature=0, max_new_tokens=9)
                for question in QUESTIONS
            )
        )

    with chatglm.Engine(tokenizer, model) as engine:
        chunks = [asyncio.run(last(engine, "hi", max_new_tokens=9)), *asyncio.run(together(engine))]
    assert {chunk.finish_reason for chunk in chunks} <= {"length", "stop"}


def test_repetition_penalty_equals_generate_among_neighbours_without_it(engine, loaded):
    async def crowd():
        return await asyncio.gather(
            *(
                last(engine, question, temperature=0, max_new_tokens=30, repetition_penalty=penalty)
                for question in QUESTIONS
                for penalty in (1.0, 1.3)
            )
        )

    chunks = asyncio.run(crowd())
    for question, plain, penalised in zip(QUESTIONS, chunks[::2], chunks[1::2]):
        assert plain.raw == generate(loaded, question, 30)
        assert penalised.raw == generate(loaded, question, 30, repetition_penalty=1.3)


def test_an_answer_in_a_crowd_that_comes_and_goes_equals_the_answer_alone(engine):
    draw = random.Random(0)
    requests = [
        (
            draw.choice(QUESTIONS) * draw.randrange(1, 9),
            dict(
                temperature=draw.choice([0, 0.5, 1, 2]),
                top_p=draw.choice([0.5, 0.9, 1]),
                seed=i,
                max_new_tokens=draw.randrange(5, 40),
            ),
        )
        for i in range(40)
    ]

    async def leave_early(question):
        async for _ in engine.generate(to_messages(question), max_new_tokens=200):
            if draw.random() < 0.2:
                break

    async def crowd():
        leavers = [asyncio.create_task(leave_early(question)) for question, _ in requests]
        chunks = await asyncio.gather(*(last(engine, q, **settings) for q, settings in requests))
        await asyncio.gather(*leavers)
        return chunks

    together = asyncio.run(crowd())
    assert together == [asyncio.run(last(engine, q, **settings)) for q, settings in requests]


def test_text_only_grows_and_ends_with_a_reason(engine):
    async def texts():
        return [
            chunk
            async for chunk in engine.generate(
                to_messages("你好"), temperature=0, max_new_tokens=60
            )
        ]

    chunks = asyncio.run(texts())
    for before, after in zip(chunks, chunks[1:]):
        assert after.text.startswith(before.text) and before.finish_reason is None
        assert after.completion_tokens > before.completion_tokens
    assert chunks[-1].finish_reason == "length" and chunks[-1].completion_tokens == 60


@pytest.mark.parametrize("moment", ["waiting", "prefill", "decoding"])
def test_closing_the_iterator_cancels_and_leaves_nothing(loaded, moment):
    async def scenario():
        with chatglm.Engine(*loaded, max_concurrency=1) as engine:
            prompt = "你好" * 200 if moment == "prefill" else "你好"
            with held(loaded[1]) as let:
                leaving = first = asyncio.create_task(last(engine, prompt, **ENDLESS))
                await until(lambda: engine.active == 1)
                if moment == "waiting":
                    leaving = asyncio.create_task(last(engine, "你好", **ENDLESS))
                    await until(lambda: engine.waiting == 1)
                elif moment == "decoding":
                    let(5)
                    scheduler = engine._batch._manager.batch_processor.scheduler
                    await until(
                        lambda: any(
                            state.generated_tokens for state in scheduler.active_requests.values()
                        )
                    )
                leaving.cancel()
                await asyncio.wait([leaving])
                if moment == "waiting":
                    assert engine.active == 1 and engine.waiting == 0 and not first.done()
                    first.cancel()
            await until(lambda: is_empty(engine))
            assert (await last(engine, "hi", max_new_tokens=3)).completion_tokens

    asyncio.run(scenario())


def test_one_request_more_than_there_are_places_waits_for_its_turn(loaded):
    async def scenario():
        with chatglm.Engine(*loaded, max_concurrency=2) as engine:
            with held(loaded[1]):
                tasks = [
                    asyncio.create_task(last(engine, "hi", temperature=0, max_new_tokens=20))
                    for _ in range(5)
                ]
                await until(lambda: engine.active == 2 and engine.waiting == 3)
            assert len({(await task).raw for task in tasks}) == 1

    asyncio.run(scenario())


def test_stopping_ends_answers_as_cancelled_and_leaves_no_thread(loaded):
    before = set(threading.enumerate())

    async def scenario():
        engine = chatglm.Engine(*loaded)
        seen = []
        with pytest.raises(chatglm.EngineError) as error:
            async with aclosing(engine.generate(to_messages("你好"), **ENDLESS)) as chunks:
                async for chunk in chunks:
                    seen.append(chunk)
                    if len(seen) == 3:
                        await asyncio.to_thread(engine.stop)
        assert error.value.finish_reason == "cancelled" and not engine.running

    asyncio.run(scenario())
    left = [t for t in set(threading.enumerate()) - before if "generation" in str(t).lower()]
    assert not left


def test_an_event_loop_that_is_closed_harms_no_answer_of_another(engine, loaded):
    """As in a notebook, where each asyncio.run has a loop of its own."""
    asked = engine.prepare(to_messages("你好"), SamplingParams(**ENDLESS))

    async def other(let):
        answer = asyncio.create_task(last(engine, "你好", temperature=0, max_new_tokens=12))
        await until(lambda: engine.active == 2)
        async with asyncio.timeout(LIMIT):
            while not answer.done():
                let()
                await asyncio.sleep(0.01)
        return await answer

    with held(loaded[1]) as let:
        closed = asyncio.new_event_loop()
        chunks = closed.run_until_complete(engine.submit(asked))
        closed.close()
        assert asyncio.run(other(let)).completion_tokens == 12
        asyncio.run(chunks.aclose())
    assert engine.running and not engine.active


def test_when_the_thread_dies_answers_fail_and_the_next_request_works(engine, loaded):
    async def scenario():
        def fail(*_):
            raise RuntimeError("out of memory, say")

        hook = loaded[1].model.embed_tokens.register_forward_pre_hook(fail)
        with pytest.raises(chatglm.EngineError):
            await last(engine, "hi", max_new_tokens=50)
        hook.remove()
        answer = await last(engine, "hi", temperature=0, max_new_tokens=5)
        assert answer.finish_reason == "length"
        await until(lambda: is_empty(engine))

    asyncio.run(scenario())


def test_a_damaged_weight_fails_the_request_that_meets_it_and_no_other(loaded):
    tokenizer, model = chatglm.load(GOLDEN, device="cpu")
    bad = tokenizer.encode("跟")[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan

    async def scenario():
        with chatglm.Engine(tokenizer, model) as engine:
            settings = dict(temperature=0, max_new_tokens=12)
            results = await asyncio.gather(
                *(last(engine, question, **settings) for question in ("hi", "跟", "a b c")),
                return_exceptions=True,
            )
            assert isinstance(results[1], chatglm.EngineError)
            return results

    results = asyncio.run(scenario())
    for question, chunk in [("hi", results[0]), ("a b c", results[2])]:
        answer = generate(loaded, question, 12)
        assert "跟" in answer or chunk.raw == answer


def test_what_does_not_fit_is_refused_with_both_counts(engine, loaded):
    prompt = to_messages("hi")
    count = len(loaded[0].encode_chat(prompt))
    with pytest.raises(ValueError, match=rf"max_length {count} .* {count} tokens"):
        engine.prepare(prompt, SamplingParams(max_length=count))
    assert engine.prepare(prompt, SamplingParams(max_length=count + 1)).max_new_tokens == 1
    whole = engine.prepare(prompt, SamplingParams(max_length=10**9))
    assert whole.max_new_tokens == engine.max_request_tokens - count
    assert engine.prepare(prompt, SamplingParams(max_new_tokens=7)).max_new_tokens == 7


def nested(depth):
    schema = {"type": "object"}
    for _ in range(depth):
        schema = {"properties": schema}
    return [{"role": "system", "content": "", "tools": [{"name": "f", "parameters": schema}]}]


@pytest.mark.parametrize(
    "messages", [to_messages("你" * 10**7), nested(400), nested(900)], ids=["text", "400", "900"]
)
def test_what_cannot_fit_is_refused_before_memory_is_spent_on_it(engine, monkeypatch, messages):
    monkeypatch.setattr(engine.tokenizer, "encode_chat", None)  # it would fail if it were called
    with pytest.raises(chatglm.PromptTooLong, match="at least \\d+ tokens"):
        engine.prepare(messages, SamplingParams(max_length=2048))


@pytest.mark.parametrize(
    "piece", ["a", " ", "\n\n", "hello world, ", "你好，世界。", "🚀", "<0x0A>"]
)
def test_what_fits_is_never_refused_by_its_beginning(engine, piece):
    """The count by parts is a lower bound, and a close one."""
    text = piece * (200_000 // len(piece))
    for tools in [], [{"name": "f", "description": text, "parameters": {"t": [text[:9999]]}}]:
        messages = [{"role": "user", "content": text, "tools": tools}]
        tokens = len(engine.tokenizer.encode_chat(messages))
        check_length(engine.tokenizer, messages, tokens + 1, 10**9)
        with pytest.raises(chatglm.PromptTooLong):
            check_length(engine.tokenizer, messages, tokens // 2, 10**9)


def test_the_next_turn_reads_the_cache_of_the_turn_before(engine, loaded):
    async def scenario():
        history = [["question " * 20, "answer " * 20]]
        async for _, history in engine.stream_chat("hi", history, temperature=0, max_length=300):
            pass
        seen = []
        hook = loaded[1].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        async for _ in engine.stream_chat("and", history, temperature=0, max_length=400):
            pass
        hook.remove()
        return seen[0], len(loaded[0].encode_chat(to_messages("and", history)))

    prefilled, prompt = asyncio.run(scenario())
    assert prefilled < prompt / 2


def test_after_a_thousand_requests_many_cancelled_pages_and_memory_are_back(engine):
    draw, resident = random.Random(2), []
    cache = engine._batch._manager.batch_processor.cache
    free = cache.compute_free_capacity()

    async def ask():
        prompt = draw.choice(QUESTIONS) * draw.randrange(1, 9)
        async with aclosing(engine.generate(to_messages(prompt), max_new_tokens=10)) as chunks:
            async for _ in chunks:
                if draw.random() < 0.1:
                    break

    async def ask_all():
        for _ in range(20):
            await asyncio.gather(*(ask() for _ in range(50)))
            await until(lambda: is_empty(engine))
            resident.append(psutil.Process().memory_info().rss)

    asyncio.run(ask_all())
    cache.evict_cached_blocks()  # kept for prompts that begin alike
    assert cache.compute_free_capacity() == free
    assert resident[-1] - resident[4] < 16 * 2**20


def test_the_first_tokens_come_at_once_then_the_newest_in_turn_and_the_last_at_once():
    async def counts() -> list[int]:
        latest, got, begin = LatestOutput(lambda: None), [], time.monotonic()

        async def read():
            while not (got and latest.is_finished):
                got.append(len((await latest.next()).token_ids))

        reading = asyncio.create_task(read())
        for count in range(1, 201):
            if latest.set(Output([0] * count, is_finished=count == 200)):
                latest.notify()
            for _ in range(3):  # the reader's turn
                await asyncio.sleep(0)
        await reading
        assert len(got) <= FIRST_TOKENS_UNTHROTTLED + 2 + (time.monotonic() - begin) / MIN_INTERVAL
        return got

    got = asyncio.run(counts())
    first = FIRST_TOKENS_UNTHROTTLED + 1
    assert got[:first] == list(range(1, first + 1)) and got[-1] == 200
