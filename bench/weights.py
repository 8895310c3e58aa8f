"""Weights to measure with: answers that never end early, the same for every contender.

    python -m bench.weights FOLDER

FOLDER/published is the bundled checkpoint in ChatGLM3's format, FOLDER/native the same network and
vocabulary as transformers' own GLM, with a chat template that gives the same token ids: serve that
by whatever is to be compared with `--peer`.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import GlmForCausalLM, PreTrainedTokenizerFast

import chatglm
from chatglm.checkpoint.cpu_quantizer import StoredEmbedding
from chatglm.checkpoint.files import TINY
from chatglm.hardware.cpu_linear import PackedLinear
from chatglm.text.tokenizer import COMMON_SPECIALS, ROLE_SPECIALS, ChatGLMTokenizer

CONTROLS = 3  # <unk>, <s> and </s>, the first pieces of the vocabulary
# As ChatGLMTokenizer.encode_chat: the space stands for the one SentencePiece puts before a text.
TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n "
    "{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make(folder: Path) -> tuple[Path, Path]:
    """Both forms of the weights, made where they are not yet there."""
    published, native = folder / "published", folder / "native"
    if not native.is_dir():
        publish(published)
        convert(published, native)
    return published, native


def never_stop(rows: torch.Tensor, pieces: int) -> None:
    """Overwrites the output rows [V, hidden] of what is no piece of text by the others' mean.

    The score of such a token is then the mean of the scores of all pieces. That is never the
    highest: with greedy choice, no answer stops. Nor does one within a nucleus, unless the scores
    are nearly equal, as those of the smallest random network are.
    """
    mean = rows[CONTROLS:pieces].float().mean(dim=0).to(rows.dtype)
    rows[:CONTROLS] = mean
    rows[pieces:] = mean


def publish(folder: Path) -> None:
    """The bundled checkpoint with its stop tokens out of reach."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    state = load_file(TINY / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tied = config.get("tie_word_embeddings")
    rows = state[
        "transformer.embedding.word_embeddings.weight"
        if tied
        else "transformer.output_layer.weight"
    ]
    words = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    never_stop(rows, words.vocab_size())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def convert(published: Path, native: Path) -> None:
    """The same as a checkpoint of transformers' own, which any of its servers can serve."""
    tokenizer, model = chatglm.load(published, device="cpu", dtype="float32")
    config = type(model.config)(**model.config.to_dict())
    config.architectures = ["GlmForCausalLM"]
    plain = GlmForCausalLM(config)  # without the table that would save under the published names
    plain.load_state_dict(model.state_dict())
    plain.generation_config.update(
        do_sample=True, eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.stop_ids[0]
    )
    plain.save_pretrained(native)
    fast_tokenizer(tokenizer).save_pretrained(native)


def fast_tokenizer(tokenizer: ChatGLMTokenizer) -> PreTrainedTokenizerFast:
    """The vocabulary as byte-pair merges: what SentencePiece does by the pieces' scores."""
    words = tokenizer.sp
    pieces = [words.id_to_piece(i) for i in range(words.vocab_size())]
    places = {piece: i for i, piece in enumerate(pieces)}
    # The lower the id, the higher the score: the order in which SentencePiece joins.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in places and piece[cut:] in places
    ]
    fast = Tokenizer(models.BPE(places, merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = [name if name[0] in "[<" else f"<{name}>" for name in COMMON_SPECIALS]
    fast.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in specials + ROLE_SPECIALS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def held_bytes(model) -> int:
    """Memory that the weights of a loaded model take, with their scales."""
    held = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        if isinstance(module, PackedLinear):
            held += module.held_bytes(module.in_features, module.out_features)
    if isinstance(embedding := model.get_input_embeddings(), StoredEmbedding):
        held += embedding.weight.nbytes
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        tables = [getattr(p, "SCB", None)] + ([state.absmax] if state else [])
        if state and state.nested:
            tables.append(state.state2.absmax)
        held += sum(table.nbytes for table in tables if table is not None)
    return held


if __name__ == "__main__":
    print(*make(Path(sys.argv[1])), sep="\n")
