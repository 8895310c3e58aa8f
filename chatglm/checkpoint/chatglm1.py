"""ChatGLM-6B, the first generation: its network on one page.

Three things set it apart from its successors. A prompt sees itself in both directions, and only
the answer is causal (Du et al. 2022, "GLM"). A token has two positions: its place in the prompt,
and its place in the answer. And the residual is the normalised input, scaled up.

The modules have the published names, so a published file loads as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROPE_BASE = 10000.0
RESIDUAL = (2 * 28) ** 0.5  # the original takes 28 layers for granted here


class ChatGLM1Config(PreTrainedConfig):
    model_type = "chatglm1"

    vocab_size: int = 130528
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    bos_token_id: int = 130004
    eos_token_id: int = 130005
    pad_token_id: int = 3


class Attention(nn.Module):
    def __init__(self, config: ChatGLM1Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rotation, cache, mask, step) -> torch.Tensor:
        size = self.config.head_dim
        qkv = self.query_key_value(x).unflatten(-1, (-1, 3, size))  # [B, T, H, 3, d]: by head
        qkv = qkv.permute(3, 0, 2, 1, 4)  # [3, B, H, T, d]
        query, key = rotate(qkv[:2], *rotation)
        value = qkv[2]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, query, key, value, mask, scaling=size**-0.5, **step)  # [B, T, H, d]
        return self.dense(out.flatten(-2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the first half of each head by the first position and the second half by the second.
    In a half, number j is turned together with number j + d/4."""
    halves = x.unflatten(-1, (2, 2, -1))  # [..., T, 2 positions, 2, d / 4]
    a, b = halves.unbind(-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3)


class MLP(nn.Module):
    def __init__(self, config: ChatGLM1Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: ChatGLM1Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *where) -> torch.Tensor:
        x = self.input_layernorm(x)
        x = RESIDUAL * x + self.attention(x, *where)
        x = self.post_attention_layernorm(x)
        return RESIDUAL * x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, config: ChatGLM1Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ChatGLM1ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = ChatGLM1Config
    base_model_prefix = "transformer"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # computed below
    sees_prompt_whole = True  # the engine must read a prompt in one step, and share none of it

    def __init__(self, config: ChatGLM1Config) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mask_ids = (config.gmask_token_id, config.mask_token_id)
        self.contexts: dict[int, list[int]] = {}  # first block in the paged cache -> c and g
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T]; in the engine B is 1, all sequences one after the other
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **step,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V] after N of the T tokens. `step` has the engine's paged KV cache."""
        if "cache" in step:
            lengths = step["cu_seq_lens_q"].diff()  # new tokens of each sequence
            contexts = self.find_contexts_in_step(input_ids[0].split(lengths.tolist()), step)
            # Attention on a CPU has no mask, and is told what is open in each sequence.
            step["context_lengths"] = torch.where(lengths > 1, contexts[0], 0).tolist()
            mask = open_contexts(attention_mask, step)
            contexts = contexts.repeat_interleave(lengths, dim=1)[:, None]  # [2, 1, T]
            places: torch.Tensor = position_ids  # type: ignore[assignment]
        else:
            step = {}
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            places = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
            contexts = past_key_values.contexts if past else self.find_contexts(input_ids)
            if past_key_values is not None:
                past_key_values.contexts = contexts
            mask = make_mask(places, contexts[0], attention_mask)
        x = self.transformer.word_embeddings(input_ids)
        rotation = make_rotation(places, contexts, self.config.head_dim, x.dtype)
        for layer in self.transformer.layers:
            x = layer(x, rotation, past_key_values, mask, step)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = self.transformer.final_layernorm(x[:, kept])
        return CausalLMOutputWithPast(logits=self.lm_head(x), past_key_values=past_key_values)

    def find_contexts(self, sequences: Iterable[torch.Tensor]) -> torch.Tensor:
        """For each sequence the length c of its context, which is all before <sop>, and the place g
        of its [gMASK]: [2, sequences, 1]."""
        found = []
        for ids in sequences:
            gmask, mask = (ids == name for name in self.mask_ids)
            sop = ids == self.config.bos_token_id
            # argmax is the first of several, and 0 where there is none
            found.append([found.int().argmax() for found in (sop, gmask if gmask.any() else mask)])
        return torch.tensor(found, device=self.device).T[..., None]

    def find_contexts_in_step(self, sequences: Iterable[torch.Tensor], step: dict) -> torch.Tensor:
        """The same, [2, sequences], in the engine, where one that is read already has only its
        newest token here. It is known by its first block in the paged cache."""
        blocks = first_blocks(step)
        for block, ids in zip(blocks, sequences, strict=True):
            if len(ids) > 1:
                self.contexts[block] = self.find_contexts([ids]).flatten().tolist()
        found = [self.contexts.get(block, [0, 0]) for block in blocks]
        return torch.tensor(found, device=self.device).T


def first_blocks(step: dict) -> list[int]:
    """The first block of each sequence of a step in the paged cache."""
    if step.get("block_table") is not None:  # each has one new token
        return step["block_table"][0][:, 0].tolist()
    read, write = step["read_index"][0], step["write_index"][0]
    places = read if len(read) else write  # nothing to read: all keys are new
    first = places[step["cu_seq_lens_k"]["full_attention"][:-1].long()]
    return (first // step["cache"].layer_to_allocator[0].tokens_per_page).tolist()


def make_rotation(
    places: torch.Tensor, contexts: torch.Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, 1, T, 2, d / 4] of the two positions of the tokens at `places` [B, T]:
    (i, 0) for token i of the context, and (g, 1), (g, 2), … for the answer."""
    context, gmask = contexts
    in_context = places < context
    first = torch.where(in_context, places, gmask)
    second = torch.where(in_context, 0, places - context + 1)
    steps = torch.arange(0, head_dim // 2, 2, device=places.device)
    frequencies = (ROPE_BASE ** (-steps / (head_dim // 2))).half().float()  # as the original's are
    angles = torch.stack([first, second], dim=-1)[:, None, :, :, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def make_mask(
    places: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Which keys a token sees, [B, 1, T, K]: those up to itself, and all of its context."""
    keys = torch.arange(int(places[0, -1]) + 1, device=places.device)
    sees = (keys <= places[..., None]) | (keys < context[..., None])  # [B, T, K]
    if attention_mask is not None:  # of generate: padding on the left
        sees = sees & attention_mask[:, None].bool()
    return sees[:, None]


def open_contexts(mask: torch.Tensor | None, step: dict) -> torch.Tensor | None:
    """The library's causal mask [1, 1, T, K] of a step, with each new context open in itself."""
    if mask is None:
        return None
    mask = mask.clone()
    begins = step["cu_seq_lens_q"].tolist(), step["cu_seq_lens_k"]["full_attention"].tolist()
    for query, key, context in zip(*begins, step["context_lengths"]):
        mask[..., query : query + context, key : key + context] = 0
    return mask
