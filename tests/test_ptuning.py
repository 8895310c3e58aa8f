"""P-Tuning v2: prefixes in front of the keys of every layer, from ChatGLM's scripts and peft's."""

import asyncio
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm
from chatglm.engine import cpu_attention
from chatglm.engine.cpu_glm import FusedGlmMixin
from chatglm.text.messages import to_messages
from tests.original import (
    GOLDEN,
    KINDS,
    golden,
    golden_config,
    golden_state,
    publish,
    random_state,
    write_json,
)

TUNED = GOLDEN / "chatglm2-ptuning"
ENCODER = "transformer.prefix_encoder."
LONG = "你好，什么是流式输出？" * 60  # takes several steps to read


def load(base=GOLDEN / "chatglm2", adapter=None, **options):
    return chatglm.load(base, **{"device": "cpu", "dtype": "float32", "adapter": adapter} | options)


def answers(model):
    ids = torch.randint(700, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits


def rows():
    tensors = torch.load(TUNED / "pytorch_model.bin", weights_only=True)
    return tensors[ENCODER + "embedding.weight"]


def save(folder, tensors, **changes):
    shutil.copytree(TUNED, folder, ignore=shutil.ignore_patterns("*.bin"))
    write_json(folder / "config.json", golden_config("chatglm2-ptuning", **changes))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def refused(*words, **options):
    with pytest.raises(ValueError) as caught:
        load(**options)
    message = str(caught.value)
    assert all(re.search(word, message) for word in words) and "\n" not in message, message


# Kinds of files


def test_a_projected_prefix_is_what_its_two_layers_make_of_the_embedding(tmp_path):
    e, hidden, width = 192, 64, 192
    draw = torch.Generator().manual_seed(0)
    small = {"trans.0.bias": hidden, "trans.2.bias": width}
    parts = {name: torch.randn(size, generator=draw) / 4 for name, size in small.items()}
    parts["embedding.weight"] = torch.randn(5, e, generator=draw)
    parts["trans.0.weight"] = torch.randn(hidden, e, generator=draw) / 8
    parts["trans.2.weight"] = torch.randn(width, hidden, generator=draw) / 4
    h = torch.tanh(parts["embedding.weight"] @ parts["trans.0.weight"].T + parts["trans.0.bias"])
    plain = {"embedding.weight": h @ parts["trans.2.weight"].T + parts["trans.2.bias"]}
    made = [
        load(
            adapter=save(
                tmp_path / str(projects),
                {ENCODER + name: tensor for name, tensor in some.items()},
                pre_seq_len=5,
                prefix_projection=projects,
            )
        )[1]
        for projects, some in ((True, parts), (False, plain))
    ]
    torch.testing.assert_close(answers(made[0]), answers(made[1]), rtol=0, atol=1e-5)


def test_a_checkpoint_saved_whole_brings_its_prefix(tmp_path):
    state = golden_state("chatglm2") | {ENCODER + "embedding.weight": rows()}
    publish(tmp_path, golden_config("chatglm2-ptuning"), state, "chatglm2")
    ours, theirs = answers(load(tmp_path)[1]), answers(golden("chatglm2-ptuning")[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_prefix_in_the_adapter_takes_the_place_of_one_in_the_checkpoint(tmp_path):
    state = golden_state("chatglm2") | {ENCODER + "embedding.weight": torch.rand(3, 192)}
    publish(tmp_path, golden_config("chatglm2-ptuning"), state, "chatglm2")
    ours, theirs = answers(load(tmp_path, TUNED)[1]), answers(golden("chatglm2-ptuning")[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_pefts_prefix_tuning_is_the_same_rows_under_another_name(tmp_path):
    settings = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8, "token_dim": 32}
    write_json(tmp_path / "adapter_config.json", settings)
    save_file({"prompt_embeddings": rows()}, tmp_path / "adapter_model.safetensors")
    ours, theirs = answers(load(adapter=tmp_path)[1]), answers(golden("chatglm2-ptuning")[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_config_that_asks_for_a_prefix_may_have_none(tmp_path):
    config = golden_config("chatglm2", pre_seq_len=128, prefix_projection=False)
    publish(tmp_path, config, golden_state("chatglm2"), "chatglm2")
    assert torch.equal(answers(load(tmp_path)[1]), answers(golden("chatglm2")[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_made_small_keeps_its_prefix(tmp_path, kind):
    config = golden_config("chatglm2", ffn_hidden_size=128)
    publish(tmp_path, config, random_state(config), "chatglm2")
    full, small = (answers(load(tmp_path, TUNED, quantize=q)[1]) for q in (None, kind))
    without = answers(load(tmp_path)[1])
    assert (small - full).norm() < 0.6 * (without - full).norm()


# In the engine


async def ask(engine, question):
    async for chunk in engine.generate(to_messages(question), temperature=0, max_new_tokens=20):
        pass
    return chunk.text


def alone(loaded, question):
    tokenizer, model = loaded
    tokens = len(tokenizer.encode_chat(to_messages(question))) + 20
    return model.chat(tokenizer, question, temperature=0, max_length=tokens)[0]


QUESTIONS = ["你好", LONG, LONG + "吗", "hi", "什么是流式输出？"]


def together(loaded, has_block_table=True):
    async def all_at_once():
        engine = chatglm.Engine(*loaded)
        context = engine.max_model_len
        engine.max_model_len *= has_block_table
        with engine:
            engine.max_request_tokens = context
            first = await ask(engine, LONG)  # the others find its blocks in the cache
            return first, await asyncio.gather(*(ask(engine, q) for q in QUESTIONS))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("name", ["chatglm1-ptuning", "chatglm2-ptuning"])
def test_prompts_read_in_steps_and_shared_beginnings_see_the_prefix(name):
    loaded = golden(name)[:2]
    first, answered = together(loaded)
    assert answered == [alone(loaded, question) for question in QUESTIONS]
    assert first == answered[1]


@pytest.mark.parametrize("name", ["chatglm1", "chatglm1-ptuning", "chatglm2-ptuning", "chatglm2"])
def test_the_librarys_own_attention_and_masks_do_as_well(name, monkeypatch):
    """As on a GPU: there it is sdpa with one mask for all sequences of a step."""
    loaded = golden(name)[:2]
    expected = [alone(loaded, question) for question in QUESTIONS]
    monkeypatch.setattr(cpu_attention, "NAME", "sdpa")
    monkeypatch.setattr(FusedGlmMixin, "fuse", lambda self: None)
    monkeypatch.setattr(loaded[1], "fused", False, raising=False)
    assert together(loaded, has_block_table=False)[1] == expected


def test_half_precision_keeps_the_prefix():
    _, model = load(adapter=TUNED, dtype="bfloat16")
    full = answers(golden("chatglm2-ptuning")[1])
    without = answers(golden("chatglm2")[1])
    assert (answers(model) - full).norm() < 0.1 * (without - full).norm()


# Refusals


def test_a_prefix_given_as_a_model_says_what_to_type():
    refused("--model BASE --adapter .*chatglm2-ptuning", base=TUNED)


def test_a_prefix_of_another_model_is_refused_by_its_width(tmp_path):
    folder = save(tmp_path / "a", {ENCODER + "embedding.weight": torch.rand(8, 3 * 2 * 64)})
    refused("another model", "384", "192", adapter=folder)


def test_half_a_prefix_encoder_is_refused(tmp_path):
    names = ("embedding.weight", "trans.0.weight")
    folder = save(tmp_path / "a", {ENCODER + name: torch.rand(64, 192) for name in names})
    refused("not whole", adapter=folder)


def test_a_whole_model_without_a_prefix_is_not_an_adapter():
    refused("not an adapter", adapter=GOLDEN / "chatglm3")


def test_the_golden_prefix_is_not_in_the_base():
    names = load_file(GOLDEN / "chatglm2" / "model.safetensors")
    assert not any("prefix" in name for name in names)
