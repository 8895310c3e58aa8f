"""The GLM network on one page, as the engine runs it on a CPU.

transformers' GlmForCausalLM computes the same in some 400 operations a step. In a small network,
starting them takes longer than carrying them out. Here they are about 100: q, k and v are one
product, the rotary embedding is another, of complex numbers, and RMSNorm is one operation. The
weights are the model's own. A GPU, other networks, half precision and quantised weights use the
library's code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm.engine.cpu_attention import paged_attention


class FusedGlmMixin:
    """Stands before GlmForCausalLM in a class, and takes the engine's steps from it after `fuse`.

    The fused weights are buffers of each attention layer: `.to()` and `.half()` move them with the
    model. They are in no checkpoint, because q, k and v are.
    """

    fused = False

    def fuse(self) -> None:
        """Joins q, k and v, if this page can compute the model: float32 matrices on a CPU, all of
        them in this process."""
        model: Any = self
        matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        if (
            self.fused
            or model.device.type != "cpu"
            or torch.distributed.is_initialized()
            or any(type(matrix) is not torch.nn.Linear for matrix in matrices)
            or any(parameter.dtype != torch.float32 for parameter in model.parameters())
        ):
            return
        for layer in model.model.layers:
            attention = layer.self_attn
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            for kind in ("weight", "bias"):
                joined = join_rows([getattr(projection, kind) for projection in projections])
                attention.register_buffer(f"qkv_{kind}", joined, persistent=False)
        self.fused = True

    # The library looks at the signature to see which arguments the model takes.
    @functools.wraps(GlmForCausalLM.forward)
    def forward(self, *args, **inputs) -> CausalLMOutputWithPast:
        on_this_page = self.fused and "cache" in inputs  # the paged KV cache of the engine
        if on_this_page and inputs["input_ids"].device.type == "cpu":
            return CausalLMOutputWithPast(logits=compute_logits(self, **inputs)[None])
        return super().forward(*args, **inputs)  # type: ignore[misc]


def join_rows(parts: list[torch.nn.Parameter | None]) -> torch.Tensor | None:
    """The matrices one below the other, as the published files have them. The parts become views
    of the same memory."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    joined = torch.cat([part.data for part in present])
    for part, rows in zip(present, joined.split([len(part) for part in present]), strict=True):
        part.data = rows
    return joined


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
    for layer in network.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = norm(x, layer.input_layernorm)
        qkv = linear(h, attention.qkv_weight, attention.qkv_bias)
        qkv = qkv.unflatten(-1, (-1, config.head_dim))  # [T, H + 2 G, d]
        # The first R numbers of each query and key are rotated, as R / 2 complex numbers.
        rotated = qkv[:, :-groups, : 2 * rotation.shape[-1]].unflatten(-1, (-1, 2))
        torch.view_as_complex(rotated).mul_(rotation)
        query, key, value = qkv.transpose(0, 1)[None].split(heads, dim=1)  # [1, H, T, d]
        h, _ = paged_attention(attention, query, key, value, scaling=attention.scaling, **step)
        x = x + linear(h[0].flatten(1), attention.o_proj.weight)
        h = norm(x, layer.post_attention_layernorm)
        gate, up = linear(h, mlp.gate_up_proj.weight).chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, mlp.down_proj.weight)
    return linear(norm(x[logits_to_keep], network.norm), model.lm_head.weight)
