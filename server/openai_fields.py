"""OpenAI's fields beyond those that are served: refused by name, ignored, or as good as absent.

Format: https://platform.openai.com/docs/api-reference/chat/create. The names that are not OpenAI's
are those of other servers (vLLM, SGLang, llama.cpp, transformers), which their clients send.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What would change the answer and is not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, list[Any]] = {
    "functions": [[]],
    "function_call": ["auto", "none", {}],
    "modalities": [["text"]],
    "audio": [{}],
    "web_search_options": [],
    "prediction": [{}],
    "guided_json": ["", {}],
    "guided_regex": [""],
    "guided_choice": ["", []],
    "guided_grammar": [""],
    "structured_outputs": [{}],
    "structural_tag": ["", {}],
    "json_schema": ["", {}],
    "grammar": [""],
    "regex": [""],
    "ebnf": [""],
    "bad_words": [[]],
    "bad_words_ids": [[]],
    "stop_token_ids": [[]],
    "allowed_token_ids": [[]],
    "num_beams": [0, 1],
    "use_beam_search": [False],
    "best_of": [0, 1],
    "length_penalty": [0, 1],
    "min_tokens": [0],
    "ignore_eos": [False],
    "echo": [False],
    "suffix": [""],
    "prompt_logprobs": [0, False],
    "typical_p": [0, 1],
    "mirostat": [0],
    "no_repeat_ngram_size": [0],
}

# The same, where a text is gone on with, for what means something in a conversation alone.
CHAT_ONLY: dict[str, list[Any]] = {
    "messages": [[]],
    "tools": [[]],
    "tool_choice": ["auto", "none"],
    "response_format": [{"type": "text"}],
}
ADVICE = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    **dict.fromkeys(CHAT_ONLY, "send it to /v1/chat/completions"),
}

# What changes nothing here: it is about accounts, storage and speed, or says what is so anyway.
IGNORED = frozenset(
    "model user metadata store service_tier safety_identifier prompt_cache_key "
    "prompt_cache_retention parallel_tool_calls reasoning_effort verbosity stream_options "
    "do_sample skip_special_tokens include_stop_str_in_output chat_template_kwargs "
    "add_generation_prompt continue_final_message tags".split()
)

# Other servers' names for a field of ours.
RENAMED = {"repeat_penalty": "repetition_penalty"}

# Real programs send these where their user has set nothing. They count as absent.
NOT_SET: dict[str, list[Any]] = {
    "seed": [-1],
    "max_tokens": [-1, 0],
    "max_completion_tokens": [-1, 0],
    "n": [0, -1],
    "top_k": [-1, 0],
    "min_p": [-1],
    "repetition_penalty": [0],
    "logprobs": [0],
    "top_logprobs": [-1, 0],
    "logit_bias": ["", []],
    "stop": [""],
    "stream_options": ["", []],
    "tools": ["", {}],
    "tool_choice": ["", {}],
    "response_format": ["", {}, {"type": ""}, {"type": None}],
}


def without_unset(fields: object, not_set: Mapping[str, list[Any]]) -> object:
    """The fields of a request that say something."""
    if not isinstance(fields, dict):
        return fields
    return {
        name: value
        for name, value in fields.items()
        # `True == 1` and `-1.0 == -1` in Python; here, types count.
        if not any(type(value) is type(none) and value == none for none in not_set.get(name, []))
    }
