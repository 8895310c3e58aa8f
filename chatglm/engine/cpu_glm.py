"""The GLM network on one page, as the engine runs it on a CPU.

transformers' GlmForCausalLM computes the same, in some 400 operations a step, and where the
network is small, to start them takes longer than to carry them out. Here they are about 100: q, k
and v are one product, the rotary embedding is another, of complex numbers, and RMSNorm is one
operation. The weights are the model's own. A GPU, other networks, half precision and quantised
weights take the library's way.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import linear, rms_norm, silu
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm.engine.cpu_attention import paged_attention


def use_fused_forward(model: torch.nn.Module) -> None:
    """Lets the engine's steps of `model` be computed by the page below, if that does what the
    model does: a GLM of float32 matrices, all of it in this process and on a CPU."""
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if (
        "forward" not in vars(model)  # that is, not yet
        and isinstance(model, GlmForCausalLM)
        and model.device.type == "cpu"
        and not torch.distributed.is_initialized()
        and all(type(matrix) is torch.nn.Linear for matrix in matrices)
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    ):
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.qkv = as_one(attention.q_proj, attention.k_proj, attention.v_proj)
        whole = model.forward

        @functools.wraps(whole)  # the library asks which arguments it takes
        def forward(*args, **inputs) -> CausalLMOutputWithPast:
            if "cache" in inputs:  # the paged one of the engine
                return CausalLMOutputWithPast(logits=logits(model, **inputs)[None])
            return whole(*args, **inputs)

        model.forward = forward


def as_one(*parts: torch.nn.Linear) -> list[torch.Tensor | None]:
    """Weight and bias of all `parts` one below the other, as the published files have them. The
    parts keep theirs, in the same memory."""
    found = []
    for kind in ("weight", "bias"):
        each = [getattr(part, kind) for part in parts]
        whole = None if each[0] is None else torch.cat([tensor.data for tensor in each])
        if whole is not None:
            for tensor, rows in zip(each, whole.split([len(tensor) for tensor in each])):
                tensor.data = rows
        found.append(whole)
    return found


@torch.inference_mode()
def logits(
    model: GlmForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    logits_to_keep: torch.Tensor,
    **step,
) -> torch.Tensor:
    """Scores [N, V] of what follows N of the T new tokens of all requests, those at
    `logits_to_keep`. `input_ids` and `position_ids` are [1, T]; `step` says to the attention which
    tokens are whose."""
    network, config = model.model, model.config
    groups = config.num_key_value_heads
    heads = [config.num_attention_heads, groups, groups]  # of queries, keys and values: H, G, G

    def norm(x: torch.Tensor, scale: torch.nn.Module) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], scale.weight, scale.variance_epsilon)

    x = network.embed_tokens(input_ids)[0]  # [T, hidden]
    cos, sin = network.rotary_emb(x, position_ids)  # [1, T, R], the second half repeats
    cos, sin = (part[0, :, None].chunk(2, dim=-1)[0].contiguous() for part in (cos, sin))
    turn = torch.complex(cos, sin)  # [T, 1, R / 2]
    for layer in network.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = linear(norm(x, layer.input_layernorm), *attention.qkv)
        qkv = qkv.unflatten(-1, (-1, config.head_dim))  # [T, H + 2 G, d]
        # The first R numbers of each query and key are turned, two of them as a complex one.
        turned = qkv[:, :-groups, : 2 * turn.shape[-1]].unflatten(-1, (-1, 2))
        torch.view_as_complex(turned).mul_(turn)
        query, key, value = qkv.transpose(0, 1)[None].split(heads, dim=1)  # [1, H, T, d]
        h, _ = paged_attention(attention, query, key, value, scaling=attention.scaling, **step)
        x = x + linear(h[0].flatten(1), attention.o_proj.weight)
        h = norm(x, layer.post_attention_layernorm)
        gate, up = linear(h, mlp.gate_up_proj.weight).chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, mlp.down_proj.weight)
    return linear(norm(x[logits_to_keep], network.norm), model.lm_head.weight)
