"""A trial for CUDA: attention by block table, decode steps as CUDA graphs, the network on one page.

Without a flash-attention package the library runs SDPA over all sequences at once under a mask, and
no CUDA graphs. What is tried here needs no package beyond torch and Triton: decode steps read each
sequence's own keys where they lie in the cache, by a kernel that takes all lengths from the device,
so a graph of the step serves any lengths; prompts go to the flash attention inside torch. The
engine runs on it within `tried`. If it proves right and fast, it belongs in chatglm/engine.
"""

import argparse
import asyncio
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import chatglm
from bench import decode, gpu_kernels
from bench.gpu_checks import QUESTIONS, answer, choices
from bench.gpu_speed import build, decode_row
from chatglm.engine import cpu_attention, transformers_batch
from chatglm.hardware.device import pick_device

NAME = "paged_by_table"
BATCH_TOKENS = 2048  # prompt tokens a step
TOKENS = 24  # of each answer that is compared


# 1. Attention


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **step,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, H, T, d], the new tokens of all sequences one after the other, to
    their own keys: those in the paged cache, and the new `key` and `value` [1, G, T, d]."""
    allocator = step["cache"].layer_to_allocator[module.layer_idx]
    key_ends = step["cu_seq_lens_k"][allocator.layer_type]
    rows, new_keys, new_values = (part[0].transpose(0, 1) for part in (query, key, value))
    if step["block_table"] is not None:  # each sequence has one new token
        keys, values = allocator.get_cache_for_block_table(module.layer_idx)
        table = step["block_table"][allocator.index]
        gpu_kernels.write(new_keys, new_values, keys, values, table, key_ends)
        out = gpu_kernels.attend(rows, keys, values, table, key_ends, step["scaling"])
        return out[None], None
    read, write = (step[name][allocator.index] for name in ("read_index", "write_index"))
    keys, values = allocator.update(new_keys, new_values, module.layer_idx, read, write)
    longest = step["max_length_q"], step["max_length_k"][allocator.layer_type]
    ends = step["cu_seq_lens_q"], key_ends
    return attend_prompts(rows, keys, values, ends, longest, step["scaling"])[None], None


def attend_prompts(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Causal attention [T, H, d] of each sequence to its own `keys` [K, G, d]; `ends` are the
    cumulative numbers of tokens and of keys."""
    if rows.device.type == "cuda":
        settings = (*ends, *longest, 0.0, True, False)  # no dropout, causal, no mask returned
        return torch.ops.aten._flash_attention_forward(rows, keys, values, *settings, scale=scale)[
            0
        ]
    out = torch.zeros_like(rows)
    for i in range(len(ends[0]) - 1):
        new, own = (slice(*each[i : i + 2].tolist()) for each in ends)
        number, count = new.stop - new.start, own.stop - own.start
        mask = torch.ones(number, count, dtype=torch.bool).tril(count - number)
        out[new] = scaled_dot_product_attention(
            rows[new].transpose(0, 1)[None],
            keys[own].transpose(0, 1)[None],
            values[own].transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


# 2. The network on one page


def fuse(model) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        attention.qkv_weight = torch.cat([part.weight.data for part in parts])
        biases = [part.bias.data for part in parts if part.bias is not None]
        attention.qkv_bias = torch.cat(biases) if biases else None


@torch.inference_mode()
def compute_logits(
    model,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    logits_to_keep: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **step,
) -> torch.Tensor:
    """As chatglm/engine/cpu_glm.py, in half precision; the rotation alone is in float32."""
    network, config = model.model, model.config
    groups = config.num_key_value_heads
    heads = [config.num_attention_heads, groups, groups]

    def norm(x: torch.Tensor, scale) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], scale.weight, scale.variance_epsilon)

    x = network.embed_tokens(input_ids)[0]  # [T, hidden]
    cos, sin = network.rotary_emb(x.float(), position_ids)  # [1, T, R]
    cos, sin = (part[0, :, None].chunk(2, dim=-1)[0].contiguous() for part in (cos, sin))
    rotation = torch.complex(cos, sin)  # [T, 1, R / 2]
    for layer in network.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = norm(x, layer.input_layernorm)
        qkv = linear(h, attention.qkv_weight, attention.qkv_bias)
        qkv = qkv.unflatten(-1, (-1, config.head_dim))  # [T, H + 2 G, d]
        turned = qkv[:, :-groups, : 2 * rotation.shape[-1]]
        pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)))
        turned.copy_(torch.view_as_real(pairs * rotation).flatten(-2))
        query, key, value = qkv.transpose(0, 1)[None].split(heads, dim=1)  # [1, H, T, d]
        h, _ = attend(attention, query, key, value, scaling=attention.scaling, **step)
        x = x + linear(h[0].flatten(1), attention.o_proj.weight)
        h = norm(x, layer.post_attention_layernorm)
        gate, up = linear(h, mlp.gate_up_proj.weight).chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, mlp.down_proj.weight)
    return linear(norm(x[logits_to_keep], network.norm), model.lm_head.weight)


# 3. The engine on it


@contextmanager
def tried(model, page: bool) -> Iterator[None]:
    """Engines that start within run on the attention above; with `page`, on the network as well."""
    forward, make_manager = model.forward, model.init_continuous_batching
    make_config, name = transformers_batch.cache_config, cpu_attention.NAME
    transformers_batch.cache_config = with_graphs(make_config)
    cpu_attention.NAME = NAME  # what a Batch on a CPU sets
    model.init_continuous_batching = with_block_tables(model, make_manager)
    if page:
        fuse(model)
        model.forward = on_page(model, forward)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
        transformers_batch.cache_config, cpu_attention.NAME = make_config, name
        del model.init_continuous_batching
        if page:
            del model.forward


def with_graphs(make_config: Callable) -> Callable:
    def make(model, max_running: int):
        config = make_config(model, max_running)
        if model.device.type == "cuda":
            config.use_cuda_graph = (False, True)  # prompts differ in length, decode steps do not
            config.max_batch_tokens = BATCH_TOKENS
        return config

    return make


def with_block_tables(model, make_manager: Callable) -> Callable:
    def make(*args, **kwargs):
        manager = make_manager(*args, **kwargs)
        model.set_attn_implementation(NAME)
        config = manager.continuous_batching_config
        context = model.config.max_position_embeddings
        config.max_blocks_per_request = math.ceil(context / config.page_size)
        return manager

    return make


def on_page(model, forward: Callable) -> Callable:
    @functools.wraps(GlmForCausalLM.forward)  # the library looks at the signature
    def page(*args, **inputs):
        if "cache" not in inputs:
            return forward(*args, **inputs)
        return CausalLMOutputWithPast(logits=compute_logits(model, **inputs)[None])

    return page


# 4. The step


def measure_trial(figures, settings: argparse.Namespace) -> None:
    """Right answers first, then the speed at the full size, with and without the page."""
    device = pick_device(settings.device)
    if not gpu_kernels.ready(device):
        figures.add("trial", state=f"there is no Triton for {device.type} here")
        return
    tokenizer, model = chatglm.load(None, settings.device, settings.dtype)
    expected = ask_all(tokenizer, model)
    for page in (False, True):
        with tried(model, page):
            same = sum(one == other for one, other in zip(ask_all(tokenizer, model), expected))
        figures.add("answers", page=page, answers=len(expected), **{"as the library's": same})
    speed = decode.bandwidth(device)
    tokenizer, model = build(settings)
    for page in (False, True):
        for size, tokens in settings.size.batches.items():
            with tried(model, page), chatglm.Engine(tokenizer, model, size, size) as engine:
                row = decode_row(engine, size, tokens, speed)
                figures.add("decode", page=page, **row)
                if size == 1:
                    figures.add("the engine's choices", page=page, **choices(engine))


def ask_all(tokenizer, model) -> list[str]:
    """Greedy answers to questions of several lengths, all at once."""

    async def ask(engine: chatglm.Engine) -> list[str]:
        settings = {"temperature": 0, "max_new_tokens": TOKENS}
        asked = (answer(engine, question * 9, **settings) for question in QUESTIONS)
        return await asyncio.gather(*asked)

    with chatglm.Engine(tokenizer, model, len(QUESTIONS)) as engine:
        return asyncio.run(ask(engine))
