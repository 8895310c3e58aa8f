"""How large the KV cache is, and how many tokens a step takes."""

from __future__ import annotations

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from chatglm.hardware.device import free_memory
from chatglm.sampling import DEFAULT_MAX_LENGTH

BLOCK_SIZE = 32  # tokens in a block of the KV cache: prefixes are shared by whole blocks
CPU_CACHE_SHARE = 0.4  # of the free host memory, the most that the KV cache may take
CPU_BATCH_TOKENS = 512  # prompt tokens per step: a long prompt must not hold up the others
# On a GPU more are needed to keep it busy. But SDPA's mask takes this many numbers for each token
# of the cache: with the library's 8192, a quarter of the memory that the cache could have.
CUDA_BATCH_TOKENS = 2048
WHOLE_PROMPTS = "whole_prompts"  # the scheduler in transformers_batch.py


def cache_config(model: PreTrainedModel, max_running: int) -> ContinuousBatchingConfig:
    """The KV cache and the batch. A GPU's cache takes what memory there is; in host memory it
    takes what `max_running` conversations of DEFAULT_MAX_LENGTH tokens need."""
    settings: dict = dict(
        max_requests_per_batch=max_running,
        return_logprobs=True,
        use_async_batching=False,
        max_memory_percent=0.8,
    )
    if model.device.type == "cuda":
        settings |= dict(max_batch_tokens=CUDA_BATCH_TOKENS)
    is_half = model.dtype in (torch.bfloat16, torch.float16)  # flash attention has no float32
    whole_prompts = getattr(model, "sees_prompt_whole", False)
    if whole_prompts:
        # Each token of a prompt depends on all of it, so a prompt that begins alike shares nothing.
        longest = model.config.max_position_embeddings
        settings |= dict(
            allow_block_sharing=False,
            scheduler_type=WHOLE_PROMPTS,
            max_batch_tokens=longest + max_running,
        )
    elif model.device.type == "cuda" and is_half and is_flash_attn_2_available():
        return ContinuousBatchingConfig(**settings)  # flash attention needs its own block size
    # auto_switch_to_flash would download a flash attention from the model hub.
    settings |= dict(page_size=BLOCK_SIZE, auto_switch_to_flash=False)
    if model.device.type == "cpu":
        config = model.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        block_bytes = BLOCK_SIZE * numbers * model.dtype.itemsize  # keys and values
        affordable = int(CPU_CACHE_SHARE * free_memory(model.device) / block_bytes)
        wanted = max_running * (DEFAULT_MAX_LENGTH // BLOCK_SIZE + 1)
        settings |= dict(num_blocks=max(2, min(wanted, affordable)))
        settings.setdefault("max_batch_tokens", CPU_BATCH_TOKENS)
    return ContinuousBatchingConfig(**settings)
