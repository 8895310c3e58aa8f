"""The GLM network on one page, as the engine runs it on a CPU.

transformers' GlmForCausalLM computes the same in some 400 operations a step. In a small network,
starting them takes longer than carrying them out. Here they are about 100: q, k and v are one
product, the rotary embedding is another, of complex numbers, and RMSNorm is one operation. Each
product is by the fastest kernel for its weights (hardware/cpu_linear.py). A GPU, other networks
and half precision use the library's code.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn.functional import rms_norm, silu
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm.engine.cpu_attention import paged_attention
from chatglm.hardware.cpu_linear import Product, joined_product


class LayerProducts(NamedTuple):
    """The four matrices of a layer, each as a function of rows [M, in]."""

    qkv: Product
    output: Product
    gate_up: Product
    down: Product


class FusedGlmMixin:
    """Stands before GlmForCausalLM in a class, and takes over the engine's steps after `fuse`."""

    products: list[LayerProducts] | None = None
    score: Product  # of the output layer

    def fuse(self) -> None:
        """Packs the matrices as they are now, if this page can compute the model: one in float32
        or with small matrices, on a CPU, all of it in this process."""
        model: Any = self
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.products = None
        if (
            model.device.type != "cpu"
            or torch.distributed.is_initialized()
            or any(type(module) is not torch.nn.Linear for module in linears)
            or any(parameter.dtype != torch.float32 for parameter in model.parameters())
        ):
            return
        self.products = [
            LayerProducts(
                joined_product(
                    layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                ),
                joined_product(layer.self_attn.o_proj),
                joined_product(layer.mlp.gate_up_proj),
                joined_product(layer.mlp.down_proj),
            )
            for layer in model.model.layers
        ]
        self.score = joined_product(model.lm_head)

    # The library looks at the signature to see which arguments the model takes.
    @functools.wraps(GlmForCausalLM.forward)
    def forward(self, *args, **inputs) -> CausalLMOutputWithPast:
        on_this_page = self.products and "cache" in inputs  # the paged KV cache of the engine
        if on_this_page and inputs["input_ids"].device.type == "cpu":
            return CausalLMOutputWithPast(logits=compute_logits(self, **inputs)[None])
        return super().forward(*args, **inputs)  # type: ignore[misc]


@torch.inference_mode()
def compute_logits(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    logits_to_keep: torch.Tensor,
    **step,
) -> torch.Tensor:
    """Logits [N, V] after N of the T new tokens of all sequences, those at `logits_to_keep`.

    `input_ids` and `position_ids` are [1, T]. `step` tells the attention which tokens are whose.
    """
    network, config = model.model, model.config
    groups = config.num_key_value_heads
    heads = [config.num_attention_heads, groups, groups]  # of queries, keys and values: H, G, G

    def norm(x: torch.Tensor, scale: Any) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], scale.weight, scale.variance_epsilon)

    x = network.embed_tokens(input_ids)[0]  # [T, hidden]
    cos, sin = network.rotary_emb(x, position_ids)  # [1, T, R], the second half repeats the first
    cos, sin = (part[0, :, None].chunk(2, dim=-1)[0].contiguous() for part in (cos, sin))
    rotation = torch.complex(cos, sin)  # [T, 1, R / 2]
    for layer, products in zip(network.layers, model.products, strict=True):
        attention = layer.self_attn
        qkv = products.qkv(norm(x, layer.input_layernorm))
        qkv = qkv.unflatten(-1, (-1, config.head_dim))  # [T, H + 2 G, d]
        # The first R numbers of each query and key are rotated, as R / 2 complex numbers.
        rotated = qkv[:, :-groups, : 2 * rotation.shape[-1]].unflatten(-1, (-1, 2))
        torch.view_as_complex(rotated).mul_(rotation)
        query, key, value = qkv.transpose(0, 1)[None].split(heads, dim=1)  # [1, H, T, d]
        h, _ = paged_attention(attention, query, key, value, scaling=attention.scaling, **step)
        x = x + products.output(h[0].flatten(1))
        gate, up = products.gate_up(norm(x, layer.post_attention_layernorm)).chunk(2, dim=-1)
        x = x + products.down(silu(gate) * up)
    return model.score(norm(x[logits_to_keep], network.norm))
