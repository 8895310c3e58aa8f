"""Trains the tiny ChatGLM that comes with the project, from scratch, on a CPU.

    python -m chatglm.tiny.train                    # about 19 minutes on two cores
    python -m chatglm.tiny.train --out /tmp/mine    # leave the bundled one alone

From `corpus.jsonl` it makes a checkpoint in the published ChatGLM3 format: `tokenizer.model`
(SentencePiece), `config.json`, `tokenizer_config.json` and `model.safetensors` (float16, the
original's tensor names). At the end it prints the accuracy on `heldout.jsonl`, whose questions
are in no line of the corpus.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GlmForCausalLM

import chatglm
from chatglm.glm import ROPE_BASE, translate_config
from chatglm.tiny.corpus import Batch, Corpus, draw_batch, train_tokenizer
from chatglm.tokenizer import ChatGLMTokenizer

HERE = Path(__file__).parent


@dataclass
class Phase:
    """A part of the training, with a learning rate that goes up, stays, and goes down to 0."""

    steps: int
    muon_rate: float     # for the matrices inside the layers
    adam_rate: float     # for everything else
    average: float       # how much of the averaged weights each step keeps
    batches: list[Batch]


WARMUP_STEPS = 50
PHASES = [
    # To recognise a question is what is hard, so mostly first questions and how their answers
    # begin; some long conversations, so that the last question is found at any depth.
    Phase(2300, 2e-2, 3e-3, 0.998, [
        Batch(64, 0.6, 0.0, cut=14), Batch(24, 0.2, 0.6, cut=120),
        Batch(8, 0.12, 0.3, length=400), Batch(2, 0.08, 0.3, length=1600)]),
    # Then turns that need the one before, and answers to their end.
    Phase(950, 1e-2, 2e-3, 0.995, [
        Batch(48, 0.3, 0.0, cut=14), Batch(32, 0.4, 0.9, cut=14),
        Batch(20, 0.18, 0.6), Batch(6, 0.12, 0.5, length=500)]),
]

CONFIG = {  # the fields of the published config.json of ChatGLM3-6B; the sizes are ours
    "_name_or_path": "chatglm3-tiny", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "kv_channels": 64,
    "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
    "seq_length": 8192, "padded_vocab_size": 2432, "layernorm_epsilon": 1e-5,
    "rmsnorm": True, "post_layer_norm": True, "original_rope": True, "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0,
    "fp32_residual_connection": False, "use_cache": True, "torch_dtype": "float16",
    "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}

PUBLISHED_NAMES = {  # behind "transformer."; what is fused into each
    "embedding.word_embeddings": ["model.embed_tokens"],
    "encoder.final_layernorm": ["model.norm"],
    "output_layer": ["lm_head"],
    "encoder.layers.{}.input_layernorm": ["model.layers.{}.input_layernorm"],
    "encoder.layers.{}.post_attention_layernorm": ["model.layers.{}.post_attention_layernorm"],
    "encoder.layers.{}.self_attention.query_key_value":
        [f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"],
    "encoder.layers.{}.self_attention.dense": ["model.layers.{}.self_attn.o_proj"],
    "encoder.layers.{}.mlp.dense_h_to_4h": ["model.layers.{}.mlp.gate_up_proj"],
    "encoder.layers.{}.mlp.dense_4h_to_h": ["model.layers.{}.mlp.down_proj"],
}


# 1. Training

def train(model: GlmForCausalLM, corpus: Corpus, tokenizer: ChatGLMTokenizer,
          phase: Phase) -> GlmForCausalLM:
    """One phase; returns the model with the average of its last weights."""
    # Muon for the matrices inside the layers learns in fewer steps than AdamW for everything.
    layers = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is q for q in layers)]
    optimizers = [torch.optim.Muon(layers, lr=phase.muon_rate, weight_decay=0.1, momentum=0.95),
                  torch.optim.AdamW(others, lr=phase.adam_rate, betas=(0.9, 0.98),
                                    weight_decay=0.01)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / WARMUP_STEPS, 1.0, 0.02 + 2 * (1 - step / phase.steps)))
        for optimizer in optimizers]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(phase.average))
    bar = tqdm(range(phase.steps), desc="training", unit="step")
    for _ in bar:
        input_ids, learn = draw_batch(corpus, tokenizer, phase.batches)
        # Rows are padded on the right and attention looks left only, so no mask is needed.
        learn = learn[:, 1:]
        # The faster one of each length.
        model.set_attn_implementation("eager" if input_ids.shape[1] < 500 else "sdpa")
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids[:, :-1], use_cache=False).last_hidden_state  # [B, L, H]
            logits = model.lm_head(hidden[learn])                                       # [n, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), input_ids[:, 1:][learn])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        model.zero_grad()
        average.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return average.module


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
        1 / ROPE_BASE ** (torch.arange(0, rotary, 2) / rotary)).half()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps({
        "name_or_path": CONFIG["_name_or_path"], "remove_space": False, "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer"}, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


# 3. How good it is: questions that are in no line of the corpus

def evaluate(folder: Path, seeds: range = range(5)) -> dict[str, float]:
    """Shares of held-out questions that get the right answer, character for character: known and
    unknown ones under greedy decoding, known ones at the default sampling."""
    lines = [json.loads(line) for line in (HERE / "heldout.jsonl").read_text("utf-8").splitlines()]
    known = [line for line in lines if line["kind"] == "known"]
    unknown = [line for line in lines if line["kind"] == "unknown"]
    tokenizer, model = chatglm.load(folder, device="cpu")

    async def share_right(engine: chatglm.Engine, questions: list[dict], **settings) -> float:
        async def right(line: dict) -> bool:
            messages = [{"role": "user", "content": line["question"]}]
            async for chunk in engine.generate(messages, **settings):
                pass
            return chunk.text == line["answer"]
        return sum(await asyncio.gather(*map(right, questions))) / len(questions)

    async def shares() -> dict[str, float]:
        with chatglm.Engine(tokenizer, model) as engine:
            sampled = [await share_right(engine, known, seed=seed) for seed in seeds]
            return {"known, greedy": await share_right(engine, known, temperature=0),
                    "unknown, greedy": await share_right(engine, unknown, temperature=0),
                    "known, sampled": sum(sampled) / max(1, len(sampled))}
    return asyncio.run(shares())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tiny ChatGLM.")
    parser.add_argument("--out", type=Path, default=HERE, help="default: the bundled one's place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="only measure what lies in --out")
    args = parser.parse_args()
    if not args.evaluate:
        lines = (HERE / "corpus.jsonl").read_text("utf-8").splitlines()
        corpus = Corpus([json.loads(line)["messages"] for line in lines], args.seed)
        tokenizer_model = train_tokenizer(corpus.texts())
        tokenizer = ChatGLMTokenizer(tokenizer_model, "chatglm3")
        torch.manual_seed(args.seed)
        model = GlmForCausalLM(translate_config(CONFIG, "the tiny ChatGLM"))
        for phase in PHASES:
            model = train(model, corpus, tokenizer, phase)
        save(model.eval(), tokenizer_model, args.out)
    for name, share in evaluate(args.out).items():
        print(f"held-out questions, {name}: {share:.1%} right")


if __name__ == "__main__":
    main()
