"""`load`: a folder or a hub id becomes a tokenizer and a model that chats.

Two families are read: the published ChatGLMs (see conversion.py), and whatever transformers
supports by itself and has a chat template. No code that lies in a checkpoint is ever run. What
cannot be served gets a ValueError that says what was found and what would do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GlmForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from chatglm.checkpoint import cpu_quantizer
from chatglm.checkpoint.chatglm1 import ChatGLM1ForConditionalGeneration
from chatglm.checkpoint.conversion import (
    ChatGLMForConditionalGeneration,
    translate_chatglm1_config,
    translate_config,
)
from chatglm.checkpoint.cpu_quantizer import CpuQuantizationConfig
from chatglm.checkpoint.fields import blaming
from chatglm.checkpoint.files import check_weights, find_folder, read_config, read_json
from chatglm.checkpoint.lora import find_adapter_weights, merge_lora
from chatglm.checkpoint.memory import check_memory
from chatglm.checkpoint.prefix import add_prefix, split_off_prefix
from chatglm.checkpoint.quantize import (
    is_shrunk,
    pick_quantization,
    quantize_as_stored,
    wrong_shapes,
)
from chatglm.checkpoint.tensors import Tensors, open_tensors, stored_dtype, unpack
from chatglm.checkpoint.tokenizers import load_template_tokenizer, load_tokenizer
from chatglm.engine.cpu_glm import FusedGlmMixin
from chatglm.errors import preview
from chatglm.generate import ChatMixin
from chatglm.hardware.device import pick_device, pick_dtype
from chatglm.hardware.tensor_parallel import check_devices, launch
from chatglm.hardware.threads import single_threaded
from chatglm.text.chatglm1 import ChatGLM1Tokenizer
from chatglm.text.tokenizer import Tokenizer


@single_threaded()
def load(
    path: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    chat_format: str | None = None,
    quantize: str | None = None,
    devices: int = 1,
    adapter: str | Path | None = None,
    pack: bool = True,
) -> tuple[Tokenizer, PreTrainedModel]:
    """(tokenizer, model) of a checkpoint, ready to chat.

    `path` is a local folder (the network is then never asked), a hub id such as
    `THUDM/chatglm3-6b`, or None for the bundled tiny ChatGLM. `device` is auto (CUDA, else CPU),
    cuda, cuda:1, mps or cpu. `dtype` is auto (on a GPU bfloat16 if it has it, else float16; on a
    CPU float32), bfloat16, float16 or float32. `chat_format` overrides what the files say:
    chatglm2, chatglm3 or template. `quantize`, int8 or int4, makes the weights smaller while they
    are read. `devices` over 1 shares the network out over so many GPUs, for an `Engine` only:
    `chat` would wait for the others. `adapter` is the folder or hub id of what was trained on top
    of this checkpoint. `pack=False` keeps quantised matrices as they are saved, for shrink.py; such
    a model does not run. Raises ValueError for what cannot be served.
    """
    target = pick_device(device)
    check_devices(devices, device, target, quantize)
    folder = find_folder(path)
    published = read_config(folder)
    refuse_unservable(published, folder)
    quantize = quantize_as_stored(quantize, published, folder)
    shards = check_weights(folder)
    tokenizer: Tokenizer
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    if published.get("model_type") == "chatglm":
        tokenizer = load_tokenizer(folder, published, chat_format)
        where = str(folder / "config.json")
        config, model_class = choose_network(published, where, tokenizer)
        if is_shrunk(published):
            config.quantization_config = published["quantization_config"]
    else:
        config = load_native_config(published, folder)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
        tokenizer = load_template_tokenizer(folder, config, chat_format)
    precision = pick_dtype(dtype, target)
    quantization = pick_quantization(quantize, target, precision, pack)
    check_memory(model_class, config, target, precision, quantize, devices)
    tensors, prefix = read_tensors(shards, published, folder)
    if adapter is not None:
        adapter = find_folder(adapter)
        tensors, prefix = add_adapter(tensors, prefix, adapter)
    if devices > 1:
        settings = {"path": str(folder), "dtype": dtype, "chat_format": chat_format}
        launch(devices, target, settings | {"adapter": adapter and str(adapter)})
    model = load_weights(
        model_class, folder, tensors, config, target, precision, quantization, devices
    )
    if prefix:
        add_prefix(model, prefix, adapter or folder)
    return tokenizer, model


def choose_network(
    published: dict, where: str, tokenizer: Tokenizer
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The network of a published ChatGLM."""
    if isinstance(tokenizer, ChatGLM1Tokenizer):
        config = translate_chatglm1_config(published, where, tokenizer.specials)
        return config, ChatGLM1ForConditionalGeneration
    glm = translate_config(published, where, tokenizer.chat_format)
    glm.eos_token_id = tokenizer.stop_ids
    return glm, ChatGLMForConditionalGeneration


def read_tensors(shards: list[Path], published: dict, folder: Path) -> tuple[Tensors, Tensors]:
    """The published tensors in full, and those of a P-Tuning prefix among them."""
    tensors = open_tensors(shards)
    if bits := published.get("quantization_bit"):
        tensors = unpack(tensors, bits)
    tensors, prefix = split_off_prefix(tensors)
    if not tensors:
        raise ValueError(
            f"{folder} holds a P-Tuning prefix alone: pass the model that it was trained on, and "
            f"this as its adapter (--model BASE --adapter {folder})"
        )
    return tensors, prefix


def add_adapter(tensors: Tensors, prefix: Tensors, folder: Path) -> tuple[Tensors, Tensors]:
    """The base's tensors and prefix with what was trained on top of them: LoRA or P-Tuning v2."""
    if (folder / "adapter_config.json").is_file():
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        if kind == "PREFIX_TUNING":
            return tensors, open_tensors([find_adapter_weights(folder)])
        return merge_lora(tensors, folder), prefix
    _, prefix = split_off_prefix(open_tensors(check_weights(folder)))
    if not prefix:
        raise ValueError(
            f"{folder} is not an adapter: it has neither an adapter_config.json nor the tensors "
            "of a P-Tuning prefix (prefix_encoder)"
        )
    return tensors, prefix


# 1. What it is


def refuse_unservable(published: dict, folder: Path) -> None:
    """Raises ValueError for the known kinds that cannot be served, each with the way out."""
    model_type = str(published.get("model_type"))
    bits = published.get("quantization_bit", 0)
    foreign = "quantization_config" in published and not is_shrunk(published)
    if model_type == "chatglm" and (foreign or bits not in (0, 4, 8)):
        raise ValueError(
            f"{folder} is quantised in a way that is not served; load the full-precision "
            "checkpoint (--quantize int4 makes it as small)"
        )
    if model_type == "chatglm" and {"vision_config", "image_length"} & set(published):
        raise ValueError(f"{folder} is a model for images; only language models are served")
    if model_type != "chatglm" and (
        model_type not in CONFIG_MAPPING
        or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise ValueError(
            f"{folder / 'config.json'}: model_type {preview(model_type)} is not a language model "
            "of the installed transformers; ChatGLM2, ChatGLM3 and GLM-4 (-hf, 0414) are"
        )


def load_native_config(published: dict, folder: Path) -> PretrainedConfig:
    with blaming(f"{folder}: its config.json cannot be used"):
        return CONFIG_MAPPING[published["model_type"]].from_dict(published)


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
    tensors: Tensors,
    config,
    device: torch.device,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | CpuQuantizationConfig | None,
    devices: int,
):
    """Reads the tensors onto the device, one by one. Raises ValueError if one is missing, left over
    or of another shape than the configuration says."""
    chatting = chat_class(model_class)
    place = (
        {"device_map": {"": device}}
        if devices == 1
        else {"distributed_config": DistributedConfig(tp_size=devices)}
    )
    for_cpu = quantization if isinstance(quantization, CpuQuantizationConfig) else None
    is_small = hasattr(config, "quantization_config")  # already in the files
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report of a mismatch is pages long; ours follows
    try:
        with blaming(f"{folder}: the weights and config.json are not of the same model"):
            model, report = chatting.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=stored_dtype(tensors) if for_cpu else dtype,
                **place,
                ignore_mismatched_sizes=True,
                quantization_config=None if is_small else quantization,
                output_loading_info=True,
            )
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
