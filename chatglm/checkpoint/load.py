"""`load`: a folder or a hub id becomes a tokenizer and a model that chats.

Two families are read: the published ChatGLM2/ChatGLM3 (see `glm.py`), and whatever `transformers`
supports by itself and has a chat template. No code that lies in a checkpoint is ever run. What
cannot be served gets a ValueError that says what was found and what would do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GlmForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.distributed import DistributedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from chatglm.checkpoint import cpu_quantizer
from chatglm.checkpoint.conversion import ChatGLMForConditionalGeneration, translate_config
from chatglm.checkpoint.cpu_quantizer import CpuQuantizationConfig
from chatglm.checkpoint.files import check_weights, find_folder, how_to_get, read_json
from chatglm.checkpoint.memory import check_memory
from chatglm.checkpoint.quantize import (
    is_shrunk,
    pick_quantization,
    quantize_as_stored,
    wrong_shapes,
)
from chatglm.engine.cpu_glm import FusedGlmMixin
from chatglm.generate import ChatMixin
from chatglm.hardware.device import pick_device, pick_dtype
from chatglm.hardware.tensor_parallel import check_devices, launch
from chatglm.hardware.threads import single_threaded
from chatglm.text.tokenizer import ChatGLMTokenizer, TemplateTokenizer, Tokenizer


@single_threaded()
def load(
    path: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    chat_format: str | None = None,
    quantize: str | None = None,
    devices: int = 1,
    pack: bool = True,
) -> tuple[Tokenizer, PreTrainedModel]:
    """(tokenizer, model) of a checkpoint, ready to chat.

    `path` is a local folder (the network is then never asked), a hub id such as
    `THUDM/chatglm3-6b`, or None for the bundled tiny ChatGLM. `device` is auto (CUDA, else CPU),
    cuda, cuda:1, mps or cpu. `dtype` is auto (on a GPU bfloat16 if it has it, else float16; on a
    CPU float32), bfloat16, float16 or float32. `chat_format` overrides what the files say:
    chatglm2, chatglm3 or template. `quantize`, int8 or int4, makes the weights smaller while they
    are read. `devices` over 1 shares the network out over so many GPUs, for an `Engine` only:
    `chat` would wait for the others. Raises ValueError for what cannot be served.
    """
    target = pick_device(device)
    check_devices(devices, device, target, quantize)
    folder = find_folder(path)
    published = read_json(folder / "config.json")
    refuse_unservable(published, folder)
    quantize = quantize_as_stored(quantize, published, folder)
    shards = check_weights(folder)
    tokenizer: Tokenizer
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    if published.get("model_type") == "chatglm":
        chat_format = chat_format or detect_chat_format(published, folder)
        tokenizer = load_chatglm_tokenizer(folder, chat_format)
        config = translate_config(published, str(folder), chat_format)
        config.eos_token_id = tokenizer.stop_ids
        if is_shrunk(published):
            config.quantization_config = published["quantization_config"]
        model_class = ChatGLMForConditionalGeneration
    else:
        config = load_native_config(folder)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
        tokenizer = load_template_tokenizer(folder, config, chat_format)
    precision = pick_dtype(dtype, target)
    quantization = pick_quantization(quantize, target, precision, pack)
    check_memory(model_class, config, target, precision, quantize, devices)
    if devices > 1:
        launch(devices, target, {"path": str(folder), "dtype": dtype, "chat_format": chat_format})
    model = load_weights(
        model_class, folder, shards, config, target, precision, quantization, devices
    )
    return tokenizer, model


# 1. What it is


def refuse_unservable(published: dict, folder: Path) -> None:
    """Raises ValueError for the known kinds that cannot be served, each with the way out."""
    model_type = str(published.get("model_type"))
    quantised = published.get("quantization_bit") or published.get("quantization_config")
    if model_type == "chatglm" and quantised and not is_shrunk(published):
        raise ValueError(
            f"{folder} is quantised ({quantised!a}); load the full-precision "
            "checkpoint, which has the same name without -int4 or -int8; "
            "--quantize int4 makes it as small"
        )
    if model_type == "chatglm" and {"position_encoding_2d", "inner_hidden_size"} & set(published):
        raise ValueError(
            f"{folder} is the first ChatGLM-6B, another network than its successors; "
            "use ChatGLM2-6B, ChatGLM3-6B or GLM-4"
        )
    if model_type == "chatglm" and published.get("pre_seq_len"):
        raise ValueError(f"{folder} has P-Tuning (pre_seq_len); only full or merged weights load")
    if model_type == "chatglm" and is_tiktoken(folder):
        raise ValueError(
            f"{folder} is GLM-4 in its first form, whose tokenizer needs its own "
            "code; use the weights with -hf in the name, as THUDM/glm-4-9b-chat-hf"
        )
    if model_type != "chatglm" and (
        model_type not in CONFIG_MAPPING
        or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise ValueError(
            f"{folder}: model_type {model_type!a} is no language model of the "
            "installed transformers; ChatGLM2, ChatGLM3 and GLM-4 (-hf, 0414) are"
        )


def is_tiktoken(folder: Path) -> bool:
    """Whether the vocabulary is GLM-4's: lines of a base64 string and a number."""
    vocabulary, settings = folder / "tokenizer.model", folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("tokenizer_class") == "ChatGLM4Tokenizer":
        return True
    if not vocabulary.is_file():
        return False
    with vocabulary.open("rb") as start:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start.read(200)) is not None


def detect_chat_format(published: dict, folder: Path) -> str:
    """chatglm2 or chatglm3, by the files that come with the weights (read as text, never run)."""
    names = [str(published.get("_name_or_path", "")), folder.resolve().name]
    texts = []
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            names.append(str(content.get("name_or_path", "")))
            texts.append(json.dumps(content, ensure_ascii=False))
    if (code := folder / "tokenization_chatglm.py").is_file():
        texts.append(code.read_text(encoding="utf-8", errors="replace"))
    if any(re.search(r"chatglm\d?-.*base", name, re.IGNORECASE) for name in names):
        raise ValueError(
            f"{folder} is a base model, not trained to chat; use the chat model, or "
            "pass chat_format (--chat-format) chatglm3 if you have tuned it to"
        )
    if any("<|user|>" in text for text in texts):
        return "chatglm3"
    for generation in ("chatglm3", "chatglm2"):
        if any(generation in name.lower() for name in names):
            return generation
    if (folder / "tokenization_chatglm.py").is_file():
        return "chatglm2"
    raise ValueError(
        f"{folder}: its files do not say which chat format it speaks; pass "
        "chat_format (--chat-format) chatglm2 or chatglm3"
    )


def load_chatglm_tokenizer(folder: Path, chat_format: str) -> ChatGLMTokenizer:
    file = folder / "tokenizer.model"
    if chat_format not in ("chatglm2", "chatglm3"):
        raise ValueError(
            f"{folder} is a ChatGLM: chat_format can be chatglm2 or chatglm3, not {chat_format!a}"
        )
    if not file.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.model, the SentencePiece file that comes "
            "with every ChatGLM2 and ChatGLM3; copy it next to the weights"
        )
    try:
        return ChatGLMTokenizer(file.read_bytes(), chat_format)
    except RuntimeError as error:
        raise ValueError(f"{file} is no SentencePiece model; {how_to_get(file)}") from error


def load_native_config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: its config.json cannot be used ({error})") from error


def load_template_tokenizer(folder: Path, config, chat_format: str | None) -> TemplateTokenizer:
    if chat_format not in (None, "template"):
        raise ValueError(
            f"{folder} is no ChatGLM2 or ChatGLM3: chat_format can only be template, "
            f"not {chat_format!a}"
        )
    settings = folder / "tokenizer_config.json"
    own_code = settings.is_file() and "auto_map" in read_json(settings)
    source = PreTrainedTokenizerFast if own_code else AutoTokenizer
    try:
        tokenizer = source.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({error})") from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder} has no chat template: a base model, not trained to chat. "
            "Use its chat or instruct version"
        )
    stops = [config.eos_token_id, tokenizer.eos_token_id]
    if (file := folder / "generation_config.json").is_file():
        stops.append(read_json(file).get("eos_token_id"))
    lists = [stop if isinstance(stop, list) else [stop] for stop in stops if stop is not None]
    return TemplateTokenizer(tokenizer, sorted(set().union(*lists)))


# 2. Onto the device


def chat_class(model_class: type[PreTrainedModel]) -> Any:
    """The class with `chat` and `stream_chat`, and a GLM with its fast path on a CPU. It keeps its
    name, because the table in conversion.py is registered under that."""
    is_plain_glm = model_class is GlmForCausalLM
    mixins = (ChatMixin, FusedGlmMixin) if is_plain_glm else (ChatMixin,)
    return type(model_class.__name__, (*mixins, model_class), {})


def load_weights(
    model_class,
    folder: Path,
    shards: list[Path],
    config,
    device: torch.device,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | CpuQuantizationConfig | None,
    devices: int,
):
    """Streams the shards onto the device. Raises ValueError if a tensor is missing, left over or
    of another shape than the configuration says."""
    chatting: Any = chat_class(model_class)
    place = (
        {"device_map": {"": device}}
        if devices == 1
        else {"distributed_config": DistributedConfig(tp_size=devices)}
    )
    for_cpu = quantization if isinstance(quantization, CpuQuantizationConfig) else None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report of a mismatch is pages long; ours follows
    try:
        state_dict = cpu_quantizer.open_tensors(shards) if for_cpu else None
        model, report = chatting.from_pretrained(
            None if state_dict else folder,
            config=config,
            dtype=cpu_quantizer.stored_dtype(state_dict) if state_dict else dtype,
            state_dict=state_dict,
            **place,
            local_files_only=True,
            use_safetensors=shards[0].suffix == ".safetensors",
            ignore_mismatched_sizes=True,
            quantization_config=None if hasattr(config, "quantization_config") else quantization,
            output_loading_info=True,
        )
    except UnpicklingError as error:
        names = ", ".join(shard.name for shard in shards)
        raise ValueError(
            f"{folder}: {names} holds more than tensors, perhaps code, and is not "
            "read; use the model's safetensors files"
        ) from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}: the weights and config.json are not of the same model "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    report["mismatched_keys"] |= set(wrong_shapes(model))
    for kind, text in (
        ("missing_keys", "are missing"),
        ("unexpected_keys", "belong to no layer"),
        ("mismatched_keys", "have another shape than config.json says"),
    ):
        if report[kind]:
            found = sorted(str(key) for key in report[kind])
            raise ValueError(
                f"{folder}: {len(found)} tensors {text}, such as {found[0]}; the "
                "weights and config.json are not of the same model"
            )
    if for_cpu and for_cpu.pack:
        cpu_quantizer.finish(model, for_cpu.kind)
    return model.eval()
