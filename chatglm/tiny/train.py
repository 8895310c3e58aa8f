"""Trains the tiny ChatGLM that comes with the project, from scratch, on a CPU.

    python -m chatglm.tiny.train --out /tmp/mine       # 17 to 20 minutes on two cores
    python -m chatglm.tiny.train --out chatglm/tiny    # replace the bundled one

From `corpus.jsonl` it makes a checkpoint in the published ChatGLM3 format: `tokenizer.model`
(SentencePiece), `config.json`, `tokenizer_config.json` and `model.safetensors` (float16, the
original's tensor names). At the end it prints the accuracy on `heldout.jsonl`, whose questions
are in no line of the corpus.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GlmForCausalLM

from chatglm.checkpoint.conversion import ROPE_BASE, translate_config
from chatglm.text.tokenizer import ChatGLMTokenizer
from chatglm.tiny.batches import Batch, batches, train_tokenizer
from chatglm.tiny.corpus import Corpus
from chatglm.tiny.evaluation import evaluate

HERE = Path(__file__).parent


STEPS = 2750
WARMUP_STEPS = 50  # the learning rates rise, stay, and fall in the second half
MUON_RATE = 2e-2  # for the matrices inside the layers
ADAM_RATE = 3e-3  # for everything else
# Share of the steps in which input and output embeddings are tied. Then learning to copy from the
# context works for all pieces at once, not piece by piece.
TIED_FRACTION = 0.5
AVERAGE = 0.998  # decay of the exponential moving average of the weights
BATCHES = [
    Batch(72, 0.36, cut=14),  # to recognise a question
    Batch(48, 0.13, follow_up=0.9, cut=20),  # a question that refers to the answer before
    Batch(24, 0.12, follow_up=0.85),  # whole answers
    Batch(110, 0.09, tools=1.0, calls=True),  # the arguments of a call
    Batch(48, 0.08, tools=1.0),  # an answer from a tool's result
    Batch(16, 0.08, declared=1, tools=0.7, length=240),  # whether to call a tool
    Batch(7, 0.10, follow_up=0.15, declared=4, tools=0.7, length=650),  # which tool to call
    Batch(8, 0.03, follow_up=0.4, length=400),  # long conversations
    Batch(2, 0.02, follow_up=0.3, length=1600),
]

CONFIG: dict[
    str, Any
] = {  # the fields of the published config.json of ChatGLM3-6B; the sizes are ours
    "_name_or_path": "chatglm3-tiny",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "kv_channels": 64,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 8192,
    "padded_vocab_size": 3648,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "hidden_dropout": 0.0,
    "fp32_residual_connection": False,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

PUBLISHED_NAMES = {  # behind "transformer."; what is fused into each
    "embedding.word_embeddings": ["model.embed_tokens"],
    "encoder.final_layernorm": ["model.norm"],
    "output_layer": ["lm_head"],
    "encoder.layers.{}.input_layernorm": ["model.layers.{}.input_layernorm"],
    "encoder.layers.{}.post_attention_layernorm": ["model.layers.{}.post_attention_layernorm"],
    "encoder.layers.{}.self_attention.query_key_value": [
        f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"
    ],
    "encoder.layers.{}.self_attention.dense": ["model.layers.{}.self_attn.o_proj"],
    "encoder.layers.{}.mlp.dense_h_to_4h": ["model.layers.{}.mlp.gate_up_proj"],
    "encoder.layers.{}.mlp.dense_4h_to_h": ["model.layers.{}.mlp.down_proj"],
}


# 1. Training


def keep_memory() -> None:
    """Keeps freed memory for the next step, in huge pages: that saves two thirds of the page
    faults. It works on Linux with the GNU C library; elsewhere nothing happens."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it when it first allocates
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option:
        set_option(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        set_option(-3, 2**25)  # M_MMAP_THRESHOLD; it takes no more


@torch.no_grad()
def look_back(model: GlmForCausalLM, sharpness: float = 6.0) -> None:
    """Makes two heads of the first layer look at the last token, and at the one before it.

    Copying from the context (the city into a call, a result into the answer) is built on such
    heads (Olsson et al. 2022, "In-context Learning and Induction Heads"), and they are slow to
    form. Biases of query and key make one: with rotary position embedding, their product depends
    on the distance only, and is greatest where the rotation makes up for the query's angle.
    """
    head_dim, attention = CONFIG["kv_channels"], model.model.layers[0].self_attn
    rotary = head_dim // 2
    angles = ROPE_BASE ** (-torch.arange(0, rotary, 2) / rotary)[:8]  # the fastest
    key = attention.k_proj.bias.view(-1, head_dim)[0]
    key[0:16:2] = sharpness
    for head, distance in ((0, 1), (1, 2)):  # both share the first key
        query = attention.q_proj.bias.view(-1, head_dim)[head]
        query[0:16:2] = sharpness * torch.cos(distance * angles)
        query[1:16:2] = -sharpness * torch.sin(distance * angles)


def train(
    model: GlmForCausalLM,
    corpus: Corpus,
    tokenizer: ChatGLMTokenizer,
    kinds: list[Batch] = BATCHES,
    steps: int = STEPS,
    rate: float = 1.0,
    tied: float = TIED_FRACTION,
    average_over: float = AVERAGE,
    bfloat16: bool = True,
) -> GlmForCausalLM:
    """Returns the model with the average of its last weights. `rate` scales both learning rates;
    `finetune.py` takes small steps, and few."""
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    if tied:
        output.data.copy_(embedding)
    # Muon for the matrices inside the layers learns in fewer steps than AdamW for everything.
    layers = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is q for q in layers)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(layers, lr=rate * MUON_RATE, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(
            others, lr=rate * ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / WARMUP_STEPS, 1.0, 0.02 + 2 * (1 - step / steps)),
        )
        for optimizer in optimizers
    ]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average_over)
    )
    drawn = itertools.islice(batches(corpus, tokenizer, kinds), steps)
    bar = tqdm(drawn, desc="training", unit="step", total=steps)
    for step, (input_ids, counts) in enumerate(bar):
        # Rows are padded on the right and attention looks left only, so no mask is needed.
        learn = counts[:, 1:] > 0
        counts = counts[:, 1:][learn]
        # Eager attention is faster for short rows.
        model.set_attn_implementation("eager" if input_ids.shape[1] < 500 else "sdpa")
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden = model.model(input_ids[:, :-1], use_cache=False).last_hidden_state  # [B, L, H]
            logits = model.lm_head(hidden[learn])  # [n, V]
        loss = (
            torch.nn.functional.cross_entropy(
                logits.float(), input_ids[:, 1:][learn], reduction="none"
            )
            @ counts
            / counts.sum()
        )
        loss.backward()
        if step < tied * steps and output.grad is not None:  # equal gradients keep them tied
            output.grad.copy_(embedding.grad.add_(output.grad))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        average.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return average.module  # type: ignore[return-value]


# 2. The published format


def save(model: GlmForCausalLM, tokenizer_model: bytes, out: Path) -> None:
    """Writes the checkpoint as ChatGLM3-6B's is: the original's names, q, k, v in one tensor."""
    state, tensors = model.state_dict(), {}
    for name, parts in PUBLISHED_NAMES.items():
        for layer in range(CONFIG["num_layers"] if "{}" in name else 1):
            for kind in ("weight", "bias"):
                sources = [f"{part.format(layer)}.{kind}" for part in parts]
                if sources[0] in state:
                    fused = torch.cat([state[source] for source in sources])
                    tensors[f"transformer.{name.format(layer)}.{kind}"] = fused.half()
    rotary = CONFIG["kv_channels"] // 2
    tensors["transformer.rotary_pos_emb.inv_freq"] = (
        1 / ROPE_BASE ** (torch.arange(0, rotary, 2) / rotary)
    ).half()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "name_or_path": CONFIG["_name_or_path"],
                "remove_space": False,
                "do_lower_case": False,
                "tokenizer_class": "ChatGLMTokenizer",
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tiny ChatGLM.")
    parser.add_argument("--out", type=Path, help=f"where to write it; {HERE} replaces the bundled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="measure it quantised")
    args = parser.parse_args()
    if not args.evaluate:
        if args.out is None:
            parser.error("--out is missing: a folder for the new model")
        keep_memory()
        lines = (HERE / "corpus.jsonl").read_text("utf-8").splitlines()
        corpus = Corpus([json.loads(line) for line in lines], args.seed)
        tokenizer_model = train_tokenizer(corpus.texts())
        tokenizer = ChatGLMTokenizer(tokenizer_model, "chatglm3")
        torch.manual_seed(args.seed)
        model = GlmForCausalLM(translate_config(CONFIG, "the tiny ChatGLM"))
        look_back(model)
        model = train(model, corpus, tokenizer)
        save(model.eval(), tokenizer_model, args.out)
    for name, share in evaluate(args.out or HERE, args.quantize).items():
        print(f"held-out questions, {name}: {share:.1%} right")


if __name__ == "__main__":
    main()
