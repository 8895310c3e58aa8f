"""Who runs and who waits: places and the line are shared out by client."""

import asyncio
import itertools
import random
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from fastapi import FastAPI

import api
import chatglm
from chatglm import SamplingParams
from chatglm.engine.queue import AdmissionQueue
from chatglm.engine.sequence import LatestOutput, Output, Sequence
from chatglm.text.messages import to_messages
from server.settings import Settings
from tests.servers import LIMIT

GOLDEN = Path(__file__).parent / "golden" / "chatglm3"
ENDLESS = SamplingParams(temperature=0, max_length=1000)  # of 你好, which this model never ends


@pytest.fixture(scope="module")
def loaded():
    return chatglm.load(GOLDEN, device="cpu")


def prepare(engine, seed, tokens):
    params = SamplingParams(temperature=1, seed=seed, max_new_tokens=tokens)
    return engine.prepare(to_messages("你好"), params)


async def answer(engine, sequence, client=""):
    async with aclosing(await engine.submit(sequence, client)) as chunks:
        async for chunk in chunks:
            pass
    return chunk.raw


def test_a_client_that_holds_every_place_gives_some_to_one_who_comes_later(loaded):
    async def scenario():
        with chatglm.Engine(*loaded, max_concurrency=4) as engine:
            async with AsyncExitStack() as stack:
                for _ in range(9):
                    chunks = await engine.submit(engine.prepare(to_messages("你好"), ENDLESS), "a")
                    await stack.enter_async_context(aclosing(chunks))
                assert (engine.active, engine.waiting) == (4, 5)
                assert await answer(engine, prepare(engine, seed=1, tokens=5), "b")
                # b may come again, so a has half of the places for now.
                assert (engine.active, engine.waiting) == (2, 7)

    asyncio.run(scenario())


def test_an_answer_that_was_paused_goes_on_as_if_it_had_not_been(loaded):
    def long_ones(engine):
        """They do not end by themselves, see ENDLESS."""
        return [
            engine.prepare(
                to_messages("你好"), SamplingParams(temperature=0, max_new_tokens=400 + number)
            )
            for number in range(6)
        ]

    async def alone(engine):
        return [await answer(engine, each) for each in long_ones(engine)]

    async def interrupted(engine):
        sequences = long_ones(engine)
        greedy = [asyncio.create_task(answer(engine, each, "a")) for each in sequences]
        await asyncio.sleep(0)
        while any(not each.latest.token_ids for each in engine._admission.running):
            await asyncio.sleep(0)
        for number in range(20):
            await answer(engine, prepare(engine, 1, 2), f"other {number % 3}")
        answers = [await task for task in greedy]
        assert any(each.resumed_ids for each in sequences)  # else nothing was tested
        return answers

    with chatglm.Engine(*loaded, max_concurrency=4) as engine:
        expected = asyncio.run(alone(engine))
        assert asyncio.run(interrupted(engine)) == expected


def test_an_answer_may_be_paused_and_come_back_before_its_first_token(loaded):
    async def scenario():
        with chatglm.Engine(*loaded, max_concurrency=2) as engine:
            for seed in range(5):
                first = await engine.submit(engine.prepare(to_messages("你好"), ENDLESS), "a")
                await anext(first)
                waits = asyncio.create_task(answer(engine, prepare(engine, seed, tokens=20), "a"))
                await asyncio.sleep(0)
                other = await engine.submit(prepare(engine, seed, tokens=20), "b")  # it is paused
                await first.aclose()  # and comes back in the same moment
                paused = await waits
                assert paused == await answer(engine, prepare(engine, seed, tokens=20), "a")
                await other.aclose()

    asyncio.run(asyncio.wait_for(scenario(), LIMIT))


def test_whoever_waits_for_more_than_a_new_cache_has_is_told_so():
    async def scenario():
        queue = AdmissionQueue(1, 100, lambda sequence: None, lambda sequence: None)
        queue.resize(50)
        running, large, small = (Sequence([1], 1, SamplingParams(seed=0)) for _ in range(3))
        for sequence, blocks in ((running, 10), (large, 40), (small, 10)):
            sequence.num_blocks, sequence.latest = blocks, LatestOutput(lambda: None)
            queue.enqueue(sequence)
        queue.resize(20)
        queue.release(running)
        assert queue.running == [small] and not queue.waiting
        with pytest.raises(chatglm.EngineError, match="too small"):
            await large.latest.next()

    asyncio.run(scenario())


def test_the_line_is_shared_too(loaded):
    async def scenario():
        with chatglm.Engine(*loaded, max_concurrency=1, max_waiting=4) as engine:
            async with AsyncExitStack() as stack:

                async def ask(client):
                    chunks = await engine.submit(
                        engine.prepare(to_messages("你好"), ENDLESS), client
                    )
                    await stack.enter_async_context(aclosing(chunks))

                for _ in range(5):
                    await ask("a")
                with pytest.raises(chatglm.QueueFull, match="4 requests wait"):
                    await ask("a")
                await ask("b")
                await ask("b")
                with pytest.raises(chatglm.QueueFull):
                    await ask("b")

    asyncio.run(scenario())


def test_a_place_that_comes_free_is_for_the_client_that_runs_least_not_for_the_first_in_line():
    queue = AdmissionQueue(4, 100, lambda sequence: None, lambda sequence: None)
    queue.num_blocks = 100

    def ask(client):
        sequence = Sequence([1], 1, SamplingParams(seed=0))
        sequence.client, sequence.num_blocks = client, 1
        queue.enqueue(sequence)
        return sequence

    one_of_b, *_, waits_first, waits_second = [ask(client) for client in "baabbc"]
    assert list(queue.waiting) == [waits_first, waits_second]
    queue.release(one_of_b)
    assert list(queue.waiting) == [waits_first]


def some_sequence(draw, queue):
    sequence = Sequence([1], 1, SamplingParams(seed=0))
    sequence.client, sequence.num_blocks = draw.choice("aaaaabc"), draw.randrange(1, 60)
    sequence.latest = LatestOutput(lambda: queue.release(sequence))
    return sequence


def test_whoever_comes_and_goes_nothing_is_lost_or_let_in_that_does_not_fit():
    async def scenario(seed):
        draw, joined, present = random.Random(seed), set(), []
        queue = AdmissionQueue(6, 100, joined.add, joined.remove)
        queue.num_blocks = 100
        for _ in range(300):
            if draw.random() < 0.5 and len(present) < 20:
                present.append(some_sequence(draw, queue))
                queue.enqueue(present[-1])
            elif present:
                sequence = present.pop(draw.randrange(len(present)))
                if sequence in joined and draw.random() < 0.5:
                    sequence.latest.set(Output([1], is_finished=True))
                    sequence.latest.notify()
                queue.release(sequence)
                joined.discard(sequence)
            assert set(queue.running) == joined
            assert {*queue.running, *queue.waiting} == set(present)
            assert len(queue.running) <= 6 and queue.reserved_blocks <= 100
            assert queue.running or not queue.waiting

    for seed in range(30):
        asyncio.run(scenario(seed))


@pytest.mark.parametrize("is_text", [True, False])
def test_the_mark_between_messages_is_in_no_text(loaded, is_text):
    special = loaded[0].specials["<|assistant|>"]
    params = SamplingParams(seed=0, max_new_tokens=30, logit_bias=((special, 7.0),))

    async def scenario():
        with chatglm.Engine(*loaded) as engine:
            prompt = "你好" if is_text else to_messages("你好")
            async with aclosing(await engine.submit(engine.prepare(prompt, params))) as chunks:
                texts = [chunk.text async for chunk in chunks]
            assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
            texts[-1].encode()

    asyncio.run(scenario())


def shared_tokens(engine):
    """How many tokens of each prompt, from now on, are found in the cache."""
    cache, found = engine._batch._manager.batch_processor.cache, []
    search = cache.search_prefix_match

    def watch(*arguments):
        found.append(search(*arguments))
        return found[-1]

    cache.search_prefix_match = watch
    return found


@pytest.mark.parametrize("separate", [False, True])
def test_cached_prefixes_are_everyones_or_with_separate_caches_each_clients_own(loaded, separate):
    """A prompt with the same first block, not the same prompt: its beginning alone gives it away.

    Answered in one crowd, whose blocks fill while others run; then one after the other.
    """
    whole, other = to_messages("你好" * 60), to_messages("你好" * 59 + "世界")
    params = SamplingParams(temperature=0, max_new_tokens=40)

    async def scenario(engine):
        crowd = [
            answer(engine, engine.prepare(prompt, params), client)
            for client in ("", "a", "b")
            for prompt in (whole, other)
        ]
        answers = await asyncio.gather(*crowd)
        assert answers[::2] == answers[:1] * 3 and answers[1::2] == answers[1:2] * 3
        found = shared_tokens(engine)
        for client in ("c", "c", "d", "d", ""):
            assert await answer(engine, engine.prepare(whole, params), client) == answers[0]
        return [tokens > 0 for tokens in found]

    with chatglm.Engine(*loaded, separate_caches=separate) as engine:
        known = asyncio.run(scenario(engine))
    assert known == ([False, True, False, True, True] if separate else [True] * 5)


@pytest.mark.parametrize("separate", [False, True])
def test_the_flag_reaches_the_engine(loaded, separate):
    app = FastAPI()
    app.state.loaded, app.state.settings = loaded, Settings(separate_caches=separate)

    async def start():
        async with api.lifespan(app):
            return app.state.engine.separate_caches

    assert asyncio.run(start()) is separate
