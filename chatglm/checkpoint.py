"""`load`: a folder or a hub id becomes a tokenizer and a model that chats.

Two families are read: the published ChatGLM2/ChatGLM3 (see `glm.py`), and whatever `transformers`
supports by itself and has a chat template. No code that lies in a checkpoint is ever run. What
cannot be served gets a ValueError that says what was found and what would do.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from chatglm.chat import ChatMixin
from chatglm.device import check_memory, pick_device, pick_dtype
from chatglm.glm import ChatGLMForConditionalGeneration, translate_config
from chatglm.tokenizer import ChatGLMTokenizer, TemplateTokenizer

TINY = Path(__file__).parent / "tiny"
CHAT_FORMATS = ("chatglm2", "chatglm3", "template")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def load(path: str | Path | None = None, device: str = "auto", dtype: str = "auto",
         chat_format: str | None = None):
    """(tokenizer, model) of a checkpoint, ready to chat.

    `path` is a local folder (the network is then never asked), a hub id such as
    `THUDM/chatglm3-6b`, or None for the bundled tiny ChatGLM. `device` is auto (CUDA, else CPU),
    cuda, cuda:1, mps or cpu. `dtype` is auto (bfloat16 where the GPU has it, else float16; float32
    on a CPU), bfloat16, float16 or float32. `chat_format` overrides what the files say: chatglm2,
    chatglm3 or template. Raises ValueError for what cannot be served.
    """
    target = pick_device(device)
    folder = find_folder(path)
    published = read_json(folder / "config.json")
    refuse_unservable(published, folder)
    shards = check_weights(folder)
    if published.get("model_type") == "chatglm":
        config, model_class = translate_config(published, str(folder)), ChatGLMForConditionalGeneration
        chat_format = chat_format or detect_chat_format(published, folder)
        tokenizer = load_chatglm_tokenizer(folder, chat_format)
        config.eos_token_id = tokenizer.stop_ids
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        tokenizer = load_template_tokenizer(folder, config, chat_format)
    precision = pick_dtype(dtype, target)
    check_memory(model_class, config, target, precision)
    model = load_weights(model_class, folder, shards, config, target, precision)
    return tokenizer, model


# 1. Where it lies

def find_folder(path: str | Path | None) -> Path:
    """A local folder with a config.json; a hub id is downloaded first, code files left out."""
    if path is None:
        return TINY
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no checkpoint folder: it has no config.json")
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"{path} is neither a folder nor a hub id such as THUDM/chatglm3-6b")
    return download(str(path))


def download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        texts = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
        folder = Path(snapshot_download(repo_id, allow_patterns=[*texts, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, allow_patterns=[*texts, "pytorch_model*.bin"]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"there is no folder {repo_id}, and the model hub does not give it either "
                         f"({reason}); download it elsewhere and pass the folder's path") from error


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


# 2. What it is

def refuse_unservable(published: dict, folder: Path) -> None:
    """Raises ValueError for the known kinds that cannot be served, each with the way out."""
    model_type = published.get("model_type")
    quantised = published.get("quantization_bit") or published.get("quantization_config")
    if model_type == "chatglm" and quantised:
        raise ValueError(f"{folder} is quantised ({quantised!a}); load the full-precision checkpoint, "
                         "which has the same name without -int4 or -int8")
    if model_type == "chatglm" and ("position_encoding_2d" in published or "inner_hidden_size" in published):
        raise ValueError(f"{folder} is the first ChatGLM-6B, another network than its successors; "
                         "use ChatGLM2-6B, ChatGLM3-6B or GLM-4")
    if model_type == "chatglm" and published.get("pre_seq_len"):
        raise ValueError(f"{folder} is a P-Tuning checkpoint (pre_seq_len); only full or merged weights load")
    if model_type != "chatglm" and (
            model_type not in CONFIG_MAPPING
            or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ValueError(f"{folder}: model_type {model_type!a} is no language model that the installed "
                         "transformers supports by itself; ChatGLM2, ChatGLM3 and GLM-4 (-hf, 0414) are")


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
        raise ValueError(f"{folder} is a base model, it was not trained to chat; use the chat model, or "
                         "say chat_format (--chat-format) chatglm3 if you have tuned it to")
    if any("<|user|>" in text for text in texts):
        return "chatglm3"
    for generation in ("chatglm3", "chatglm2"):
        if any(generation in name.lower() for name in names):
            return generation
    if (folder / "tokenization_chatglm.py").is_file():
        return "chatglm2"
    raise ValueError(f"{folder}: its files do not say which chat format it speaks; say chat_format "
                     "(--chat-format) chatglm2 or chatglm3")


def load_chatglm_tokenizer(folder: Path, chat_format: str) -> ChatGLMTokenizer:
    file = folder / "tokenizer.model"
    if chat_format not in ("chatglm2", "chatglm3"):
        raise ValueError(f"{folder} is a ChatGLM: chat_format can be chatglm2 or chatglm3, not {chat_format!a}")
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.model, the SentencePiece file that comes with "
                         "every ChatGLM2 and ChatGLM3; copy it next to the weights")
    settings = folder / "tokenizer_config.json"
    tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.open("rb").read(200))
    if tiktoken or (settings.is_file() and "ChatGLM4Tokenizer" in settings.read_text(encoding="utf-8")):
        raise ValueError(f"{folder} is GLM-4 in its first form, whose tiktoken vocabulary needs the code "
                         "that lies with it; the same weights with -hf in the name load, such as "
                         "THUDM/glm-4-9b-chat-hf")
    try:
        return ChatGLMTokenizer(file.read_bytes(), chat_format)
    except RuntimeError as error:
        raise ValueError(f"{file} is no SentencePiece model ({error}); copy it anew") from error


def load_template_tokenizer(folder: Path, config, chat_format: str | None) -> TemplateTokenizer:
    if chat_format not in (None, "template"):
        raise ValueError(f"{folder} is no ChatGLM2 or ChatGLM3: chat_format can only be template, "
                         f"not {chat_format!a}")
    settings = folder / "tokenizer_config.json"
    own_code = settings.is_file() and "auto_map" in read_json(settings)
    source = PreTrainedTokenizerFast if own_code else AutoTokenizer
    try:
        tokenizer = source.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({error})") from error
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template: a base model, not trained to chat. "
                         "Use its chat or instruct version")
    stops = [config.eos_token_id, tokenizer.eos_token_id]
    if (file := folder / "generation_config.json").is_file():
        stops.append(read_json(file).get("eos_token_id"))
    flat = [i for stop in stops if stop is not None for i in (stop if isinstance(stop, list) else [stop])]
    return TemplateTokenizer(tokenizer, sorted(set(flat)))


# 3. Whether its weights are whole

def check_weights(folder: Path) -> list[Path]:
    """The weight files, each there and of full length. Raises ValueError, naming the first that is not."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        shards = [found]
    else:
        shards = [folder / name for name in sorted(set(read_json(found)["weight_map"].values()))]
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard} is missing, though {found.name} names it; download it again")
        if not is_whole(shard):
            raise ValueError(f"{shard} is cut off or damaged ({shard.stat().st_size:,} bytes); download it "
                             "again (a file of about 130 bytes is a Git LFS pointer: run git lfs pull)")
    return shards


def is_whole(shard: Path) -> bool:
    if shard.suffix == ".bin":      # torch.save writes a zip, whose directory is at the end
        return zipfile.is_zipfile(shard)
    size = shard.stat().st_size
    with shard.open("rb") as file:  # 8 bytes: length of a JSON header that gives each tensor's place
        try:
            [length] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else {}
        except (struct.error, ValueError):
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and size == 8 + length + max(ends)


# 4. Onto the device

def load_weights(model_class, folder: Path, shards: list[Path], config, device: torch.device,
                 dtype: torch.dtype):
    """Streams the shards onto the device. Raises ValueError if a tensor is missing, left over or
    of another shape than the configuration says."""
    chatting = type(model_class.__name__, (ChatMixin, model_class), {})
    try:
        model, report = chatting.from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": device}, local_files_only=True,
            use_safetensors=shards[0].suffix == ".safetensors", ignore_mismatched_sizes=True,
            output_loading_info=True)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from error
    for kind, text in (("missing_keys", "are missing"), ("unexpected_keys", "belong to no layer"),
                       ("mismatched_keys", "have another shape than config.json says")):
        if report[kind]:
            names = sorted(str(key) for key in report[kind])
            raise ValueError(f"{folder}: {len(names)} tensors {text}, such as {names[0]}; the weights and "
                             "config.json are not of the same model")
    return model.eval()
