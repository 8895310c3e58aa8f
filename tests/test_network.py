"""The network as the engine computes it on a CPU, held against transformers' own."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

import chatglm
from chatglm.engine import cpu_attention as attention
from chatglm.hardware import threads as device
from chatglm.hardware.cpu_linear import HalfLinear
from chatglm.hardware.threads import NICENESS, FreeCores
from chatglm.text.messages import to_messages
from tests.original import native
from tests.servers import LIMIT, until

GOLDEN = Path(__file__).parent / "golden"
LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts Linux's threads")


async def answers(engine, questions, temperature=0):
    async def answer(question):
        async for chunk in engine.generate(
            to_messages(question), temperature=temperature, seed=1, top_p=1, max_new_tokens=12
        ):
            pass
        return chunk

    return await asyncio.gather(*map(answer, questions))


@pytest.mark.parametrize("times", [1, 600])  # of which the second takes several steps to read
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_every_step_scores_as_transformers_own_network_does(name, times):
    tokenizer, model = chatglm.load(GOLDEN / name, device="cpu")
    steps = []
    with chatglm.Engine(tokenizer, model) as engine:
        hook = model.register_forward_hook(lambda _, inputs, output: steps.append(output.logits))
        (chunk,) = asyncio.run(answers(engine, ["你好" * times]))
        hook.remove()
        assert model.products  # or both would be the library's
    read = steps[-chunk.completion_tokens :]
    assert (len(steps) > len(read)) == (times > 1)
    ids = tokenizer.encode_chat(to_messages("你好" * times))
    for scores in read:
        expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(scores[0, -1], expected, rtol=1e-4, atol=1e-4)
        ids.append(int(expected.argmax()))


def test_a_crowd_that_is_read_a_little_at_a_time_answers_as_one_by_one(monkeypatch):
    questions = ["hi " * count for count in (1, 90, 3, 40, 7, 200, 2, 11)]
    with chatglm.Engine(*chatglm.load(GOLDEN / "chatglm3", device="cpu")) as engine:
        alone = [asyncio.run(answers(engine, [question], 1))[0].raw for question in questions]
        assert len(set(alone)) == len(alone)
        for kept in 1, 2**12, 2**14:
            monkeypatch.setattr(attention, "COPIED_AT_ONCE", kept)
            assert [c.raw for c in asyncio.run(answers(engine, questions, 1))] == alone


def test_the_model_is_whole_after_an_engine(tmp_path):
    tokenizer, model = chatglm.load(GOLDEN / "chatglm3", device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with chatglm.Engine(tokenizer, model):
        pass
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


COUNT_THREADS = """
import asyncio, os, threading, sys
import chatglm

def native():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

async def ask(engine):
    async for _ in engine.generate([{"role": "user", "content": "hi " * 300}], max_new_tokens=4):
        pass
before = native()
with chatglm.Engine(*chatglm.load(device="cpu")) as engine:
    asyncio.run(ask(engine))
    print(native() - before)
"""


@LINUX
def test_torch_has_threads_for_the_one_caller_that_computes():
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=LIMIT,
        check=True,
    )
    assert int(done.stdout) <= 1  # of a second caller there would be one more at least


def test_a_large_network_is_computed_by_as_many_threads_as_torch_was_told(monkeypatch):
    monkeypatch.setattr(device, "SMALL_MODEL_PARAMETERS", 0)
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        tokenizer, model = chatglm.load(GOLDEN / "chatglm3", device="cpu")
        model.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
        with chatglm.Engine(tokenizer, model) as engine:
            asyncio.run(answers(engine, ["hi"]))
        assert seen == {3} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@LINUX
def test_the_model_gives_way_to_the_event_loop():
    """Else /health and the answers of others wait for a core until a step ends."""

    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine, seen = niceness(), set()
    tokenizer, model = chatglm.load(GOLDEN / "chatglm3", device="cpu")
    model.register_forward_hook(lambda *_: seen.add(niceness()))
    with chatglm.Engine(tokenizer, model) as engine:
        asyncio.run(answers(engine, ["hi"]))
    assert seen == {mine + NICENESS} and niceness() == mine


@pytest.mark.parametrize("how", ["", "import os; os.nice(10); "])
def test_cores_that_other_programs_use_are_not_free(how):
    """Also if they are of a low priority, as a backup is."""
    free = FreeCores()
    others = [
        subprocess.Popen([sys.executable, "-c", how + "exec('while True: pass')"])
        for _ in range(psutil.cpu_count())
    ]
    # They run on the cores that this process may use, which can be fewer than there are.
    usable = len(getattr(psutil.Process(), "cpu_affinity", lambda: others)())
    try:
        until(lambda: free() < psutil.cpu_count() - usable / 2)
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_other_networks_in_half_precision_get_the_products_of_half_matrices(tmp_path):
    """Half the memory to read for each token, and the same numbers."""
    native(tmp_path, "Llama")
    tokenizer, model = chatglm.load(tmp_path, device="cpu", dtype="float32")
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.lm_head.weight.data[0, 0] = 1 / 3  # that one is no number of float16
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        before = model(ids).logits
        with chatglm.Engine(tokenizer, model):
            kinds = {type(m) for m in model.modules() if "Linear" in type(m).__name__}
        after = model(ids).logits
    assert kinds == {torch.nn.Linear, HalfLinear} and type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
