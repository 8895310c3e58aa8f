"""The private parts of other libraries that this project relies on, one assertion each.

    pytest tests/test_seam.py

Run this first after an upgrade. Each failure says what changed, and which file must follow.
"""

import asyncio
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GlmForCausalLM
from transformers.core_model_loading import _materialize_copy
from transformers.generation.continuous_batching import cache, requests
from transformers.generation.continuous_batching.cache_allocators import SLIDING_ATTENTION
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList as Processors,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import chatglm
from bench.sizes import CHATGLM3_6B
from chatglm import SamplingParams
from chatglm.checkpoint.conversion import translate_config
from chatglm.checkpoint.tensors import Computed
from chatglm.engine import cache_config as cache_settings
from chatglm.engine.cache_config import cache_config
from chatglm.engine.prefix_attention import prefixed_sdpa
from chatglm.engine.transformers_batch import SamplerProcessor, WholePromptScheduler
from chatglm.text.messages import to_messages

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "chatglm3"
BATCH, ATTENTION = "chatglm/engine/transformers_batch.py", "chatglm/engine/cpu_attention.py"
PREFIX, SALT = "chatglm/engine/prefix_attention.py", "chatglm/engine/cache_salt.py"
CONVERSION = "chatglm/checkpoint/conversion.py"


@pytest.fixture(scope="module")
def seen():
    """What the library shows while an engine answers: objects, and the arguments of the steps."""
    tokenizer, model = chatglm.load(GOLDEN, device="cpu")
    steps, states = [], []
    prepare = SamplerProcessor.prepare_tensor_args

    def watch(self, requests_in_batch, arg_storage):
        states.extend(requests_in_batch)
        return prepare(self, requests_in_batch, arg_storage)

    async def ask(engine):
        settings = {"max_new_tokens": 4, "repetition_penalty": 1.1, "temperature": 0}
        async for _ in engine.generate(to_messages("你好"), **settings):
            pass

    SamplerProcessor.prepare_tensor_args = watch
    model.register_forward_pre_hook(lambda _, args, step: steps.append(step), with_kwargs=True)
    try:
        with chatglm.Engine(tokenizer, model) as engine:
            asyncio.run(ask(engine))
            manager = engine._batch._manager
            cache = manager.batch_processor.cache
            yield SimpleNamespace(
                model=model,
                manager=manager,
                cache=cache,
                allocator=cache.layer_to_allocator[0],
                prefill=steps[0],
                decode=steps[-1],
                request=states[-1],
            )
    finally:
        SamplerProcessor.prepare_tensor_args = prepare


def arguments(function):
    return list(inspect.signature(function).parameters)


# What must hold, the file that relies on it, and how to see it: with a running engine or without.
PARTS = {
    "the manager keeps the output router that it was given": (
        BATCH,
        lambda seen: type(seen.manager.batch_processor.output_router).__name__ == "SequenceRouter",
    ),
    "an output router delivers one output or a list": (
        BATCH,
        lambda: (
            arguments(OutputRouter.deliver) == ["self", "output"]
            and arguments(OutputRouter.deliver_batch) == ["self", "outputs"]
        ),
    ),
    "an output has an id, tokens, log-probabilities, an error and is_finished()": (
        BATCH,
        lambda: (
            {"request_id", "generated_tokens", "logprobs", "error"}
            <= set(requests.GenerationOutput.__dataclass_fields__)
            and callable(requests.GenerationOutput.is_finished)
        ),
    ),
    "the manager keeps the logits processor that it was given": (
        BATCH,
        lambda seen: type(seen.manager.batch_processor.logit_processor) is SamplerProcessor,
    ),
    "a logits processor tells its settings, its rows, and whether it does anything": (
        BATCH,
        lambda: (
            {"supported_keys", "ignored_keys", "tensors_required", "do_processing"}
            <= set(vars(SamplerProcessor(4, 1, torch.device("cpu"))))
        ),
    ),
    "a logits processor is called with the ids, the scores and its rows": (
        BATCH,
        lambda: len(arguments(Processors.__call__)) == len(arguments(SamplerProcessor.__call__)),
    ),
    "a logits processor fills its rows by these methods": (
        BATCH,
        lambda: (
            arguments(Processors.fill_defaults) == ["self", "int32_tensor"]
            and arguments(Processors.prepare_tensor_args)
            == ["self", "requests_in_batch", "arg_storage"]
        ),
    ),
    "a request in a step tells its state and whether it gets a token": (
        BATCH,
        lambda seen: hasattr(seen.request, "state") and hasattr(seen.request, "has_new_token"),
    ),
    "a request's state has its settings, its prompt, its answer and its position": (
        BATCH,
        lambda seen: (
            isinstance(seen.request.state.logit_processor_kwargs["params"], SamplingParams)
            and isinstance(seen.request.state.initial_tokens, list)
            and isinstance(seen.request.state.generated_tokens, list)
            and isinstance(seen.request.state.position_offset, int)
        ),
    ),
    "the manager has the configuration with the block size": (
        BATCH,
        lambda seen: (
            seen.manager.continuous_batching_config.page_size == seen.allocator.tokens_per_page
        ),
    ),
    "the manager's cache tells how many blocks it has": (
        BATCH,
        lambda seen: seen.cache.num_blocks > 1,
    ),
    "the cache looks for a prompt's beginning, and is told whose it is": (
        SALT,
        lambda: (
            arguments(cache.PagedAttentionCache.search_prefix_match)
            == ["self", "request_id", "prompt_ids"]
        ),
    ),
    "each allocator hashes the blocks that a request has filled, and is told whose they are": (
        SALT,
        lambda seen: (
            seen.allocator in seen.cache.cache_allocators.values()
            and arguments(type(seen.allocator).mark_complete_blocks)[:3]
            == ["self", "request_id", "token_ids"]
        ),
    ),
    "the manager tells whether its thread takes requests": (
        BATCH,
        lambda seen: seen.manager.background_thread_status.can_accept_new_requests() is None,
    ),
    "the library's own requests, which warm up CUDA graphs, run through our processor": (
        BATCH,
        lambda seen: (
            seen.manager.batch_processor.model_runner.run_one_warmup(seen.model, 2, None) > 0
            and seen.manager.batch_processor.model_runner.run_one_warmup(seen.model, 8, 4) > 0
        ),
    ),
    "the manager adds and cancels requests by their id": (
        BATCH,
        lambda: (
            "request_id" in arguments(ContinuousBatchingManager.add_request)
            and arguments(ContinuousBatchingManager.cancel_request)[1] == "request_id"
        ),
    ),
    "the configuration takes what we set": (
        BATCH,
        lambda seen: cache_config(seen.model, 2).max_requests_per_batch == 2,
    ),
    "a step passes cumulative lengths: a tensor for queries, one per layer type for keys": (
        ATTENTION,
        lambda seen: (
            seen.prefill["cu_seq_lens_q"].tolist()[0] == 0
            and seen.allocator.layer_type in seen.prefill["cu_seq_lens_k"]
        ),
    ),
    "a prefill passes read and write indices per allocator": (
        ATTENTION,
        lambda seen: (
            seen.prefill["block_table"] is None
            and len(seen.prefill["write_index"][seen.allocator.index])
            == seen.prefill["input_ids"].shape[1]
            and len(seen.prefill["read_index"]) == len(seen.prefill["write_index"])
        ),
    ),
    "a decode passes a block table per allocator": (
        ATTENTION,
        lambda seen: seen.decode["block_table"][seen.allocator.index].dim() == 2,
    ),
    "a step passes its cache": (ATTENTION, lambda seen: seen.decode["cache"] is seen.cache),
    "an allocator has blocks of tokens, [blocks, tokens, heads, d]": (
        ATTENTION,
        lambda seen: (
            seen.allocator.get_cache_for_block_table(0)[0].shape[1]
            == seen.allocator.tokens_per_page
        ),
    ),
    "layers with a sliding window have a type of their own": (
        ATTENTION,
        lambda: SLIDING_ATTENTION == "sliding_attention",
    ),
    "the library asks forward's signature for logits_to_keep": (
        "chatglm/engine/cpu_glm.py",
        lambda seen: "logits_to_keep" in arguments(seen.model.forward),
    ),
    "a step of the engine is told from others by its cache": (
        "chatglm/engine/cpu_glm.py",
        lambda: "cache" not in arguments(GlmForCausalLM.forward),
    ),
    "a scheduler of ours can be named, and asks for candidates by one method": (
        BATCH,
        lambda: (
            SCHEDULER_MAPPING["whole_prompts"] is WholePromptScheduler
            and arguments(FIFOScheduler._process_candidates)[:3]
            == ["self", "candidates", "token_budget"]
        ),
    ),
    "a waiting request tells its status and what of its prompt is to be read": (
        BATCH,
        lambda seen: (
            seen.request.state.status in requests.RequestStatus
            and isinstance(seen.request.state.remaining_prefill_tokens, list)
        ),
    ),
    "the paged cache takes keys and values of a layer, and gives back all": (
        PREFIX,
        lambda seen: (
            arguments(seen.cache.update) == ["key_states", "value_states", "layer_idx", "kwargs"]
        ),
    ),
    "attention goes by names, and sdpa is one of them": (
        PREFIX,
        lambda: ALL_ATTENTION_FUNCTIONS["sdpa"] is prefixed_sdpa,
    ),
    "a block table begins with a sequence's first block, an index with its first key": (
        "chatglm/engine/contexts.py",
        lambda seen: (
            seen.decode["block_table"][0][0, 0]
            == seen.prefill["write_index"][0][0] // seen.allocator.tokens_per_page
        ),
    ),
    "loading reads a tensor by [...] and asks a shape by get_shape()": (
        "chatglm/checkpoint/tensors.py",
        lambda: (
            _materialize_copy(Computed([2], lambda: torch.ones(2)), dtype=torch.float16).dtype
            == torch.float16
        ),
    ),
    "weights are renamed by a table that belongs to the class of this name": (
        CONVERSION,
        lambda seen: type(seen.model).__name__ == "ChatGLMForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_transformers_still_has_this_part(request, part):
    file, holds = PARTS[part]
    found = holds(request.getfixturevalue("seen")) if arguments(holds) else holds()
    assert found, f"transformers changed: no longer true that {part}; see {file}"


def test_flash_attention_is_left_to_half_precision(monkeypatch):
    monkeypatch.setattr(cache_settings, "is_flash_attn_2_available", lambda: True)
    for dtype, switches in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert cache_config(model, 2).auto_switch_to_flash == switches


@pytest.mark.parametrize("gigabytes, conversations", [(16, 28), (24, 94), (80, 552)])
def test_a_gpu_has_room_for_so_many_conversations(monkeypatch, gigabytes, conversations):
    """Of 2048 tokens with ChatGLM3-6B in bfloat16, by the library's own arithmetic for SDPA."""
    config = translate_config(CHATGLM3_6B, "here")
    config._attn_implementation = "sdpa"
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
    settings = cache_config(model, 64)
    settings.max_blocks_per_request = 0
    whole, taken = 0.97 * gigabytes * 2**30, 12.9e9  # the weights, and what CUDA itself takes
    memory = (torch.device("cuda"), whole, taken, taken)
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", lambda: memory)
    block = settings.page_size * config.num_hidden_layers * 4 * config.head_dim * 2
    handler = cache.PagedAttentionMemoryHandler(
        config, settings, torch.bfloat16, block, settings.page_size, block, ["full"], True
    )
    _, blocks = handler.infer_max_batch_tokens_and_num_sectors()
    assert blocks * settings.page_size // 2048 == conversations


def test_only_two_files_know_the_inside_of_continuous_batching():
    inside = re.compile("transformers.generation.continuous_batching")
    files = [ROOT / "api.py", ROOT / "client.py"]
    files += [file for name in ("chatglm", "server") for file in (ROOT / name).rglob("*.py")]
    known = {
        str(file.relative_to(ROOT)) for file in files if inside.search(file.read_text("utf-8"))
    }
    assert {Path(name).as_posix() for name in known} == {BATCH, ATTENTION}
