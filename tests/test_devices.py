"""One network in several processes: it answers as in one, and what cannot be is refused."""

import asyncio
import os
import re
import subprocess
import sys

import psutil
import pytest
import torch
import transformers

import chatglm
from chatglm.checkpoint.conversion import ChatGLMForConditionalGeneration, translate_config
from chatglm.checkpoint.memory import check_memory
from chatglm.text.messages import to_messages
from tests.original import GOLDEN, golden_config, native
from tests.servers import LIMIT

QUESTIONS = ["什么是 HTTP？", "hello", "什么是 token？"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def even(folder, **changes):
    """A checkpoint of transformers' own with a vocabulary of an even number."""
    native(folder, "Qwen2")
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in ({"vocab_size": config.vocab_size + 1} | changes).items():
        setattr(config, name, value)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


ASK = """
import asyncio, sys, psutil
import chatglm
from tests.test_devices import answers

tokenizer, model = chatglm.load(sys.argv[1] or None, device="cpu", devices=2)
with chatglm.Engine(tokenizer, model) as engine:
    print(*asyncio.run(answers(engine)), sep="\\n")
with chatglm.Engine(tokenizer, model) as engine:     # the others follow a second one as well
    print(*asyncio.run(answers(engine)), sep="\\n")
print(model.model.layers[0].mlp.gate_up_proj.weight.to_local().shape[0])
print(*(process.pid for process in psutil.Process().children()))
"""


PENALISED = {"temperature": 0, "frequency_penalty": 2.0, "logit_bias": ((40, 30.0), (50, 29.0))}


async def answers(engine):
    async def ask(question, **settings):
        async for chunk in engine.generate(to_messages(question), max_new_tokens=60, **settings):
            pass
        return repr(chunk.text)

    return await asyncio.gather(
        *(
            ask(question, **settings)
            for question in QUESTIONS
            for settings in ({"temperature": 0}, {"seed": 3}, PENALISED)
        )
    )


def alone(folder=None):
    with chatglm.Engine(*chatglm.load(folder, device="cpu")) as engine:
        return asyncio.run(answers(engine))


def run(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        timeout=LIMIT,
        text=True,
        capture_output=True,
        cwd=GOLDEN.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


@no_gpu
def test_two_processes_with_half_of_the_network_each_answer_as_one():
    done = run(ASK, "", check=True)
    *lines, rows, others = done.stdout.splitlines()
    assert lines == 2 * alone()
    assert int(rows) == 704  # of the 1408 of the whole
    assert others and not [pid for pid in others.split() if psutil.pid_exists(int(pid))]


@no_gpu
def test_a_network_that_transformers_knows_by_itself_is_divided_too(tmp_path):
    even(tmp_path)
    *lines, rows, _ = run(ASK.replace("gate_up", "gate"), tmp_path, check=True).stdout.splitlines()
    assert lines == 2 * alone(tmp_path) and int(rows) == 24


@no_gpu
def test_if_one_process_ends_all_do():
    code = (
        "import chatglm, psutil, time\n"
        "engine = chatglm.Engine(*chatglm.load(device='cpu', devices=2)); engine.start()\n"
        "psutil.Process().children()[0].kill(); time.sleep(1200)"
    )
    done = run(code)
    assert done.returncode == 1 and "a process of --devices has ended" in done.stderr


def refused(*words, **options):
    with pytest.raises(ValueError) as caught:
        chatglm.load(**options)
    message = str(caught.value)
    assert all(re.search(word, message) for word in words) and "\n" not in message, message


@no_gpu
def test_a_form_is_refused_where_there_are_several_devices():
    code = (
        "import chatglm\nfrom chatglm.text.forms import JsonForm\n"
        "engine = chatglm.Engine(*chatglm.load(device='cpu', devices=2))\n"
        "engine.prepare([{'role': 'user', 'content': 'hi'}], None, JsonForm({}, 'response_format'))"
    )
    done = run(code)
    assert done.returncode == 1
    assert "response_format cannot be kept to with --devices" in done.stderr


def test_less_than_one_device_is_refused():
    refused("at least 1", devices=0)


@no_gpu
def test_without_gpus_several_are_refused():
    refused("2 NVIDIA GPUs", "auto is cpu here", devices=2)


def test_quantised_matrices_on_several_gpus_are_refused():
    refused("--quantize", "--devices", devices=2, device="cpu", quantize="int4")


@no_gpu
@pytest.mark.parametrize("devices, field", [(2, "num_key_value_heads"), (3, "intermediate_size")])
def test_a_network_that_cannot_be_divided_is_refused_before_it_is_loaded(tmp_path, devices, field):
    even(tmp_path, num_key_value_heads=1, intermediate_size=50)
    refused(field, "cannot be divided", path=tmp_path, device="cpu", devices=devices)


def test_the_refusal_for_lack_of_memory_counts_the_share_of_one_gpu():
    published = golden_config(
        hidden_size=2**17, ffn_hidden_size=3 * 2**17, num_attention_heads=32, kv_channels=128
    )
    config = translate_config(published, "here")
    told = []
    for devices in (1, 2):
        with pytest.raises(ValueError) as caught:
            check_memory(
                ChatGLMForConditionalGeneration,
                config,
                torch.device("cpu"),
                torch.bfloat16,
                None,
                devices,
            )
        told.append(float(re.search(r"take ([\d.]+) GiB", str(caught.value))[1]))
    matrices = published["num_layers"] * 3 * 3 * 2**17 * 2**17 * 2 / 2**30
    assert told[0] - told[1] == pytest.approx(matrices / 2, rel=0.01)
