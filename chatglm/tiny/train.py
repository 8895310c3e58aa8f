"""Trains the tiny ChatGLM that comes with the project, from scratch, on a CPU.

    python -m chatglm.tiny.train                    # about 15 minutes on two cores
    python -m chatglm.tiny.train --out /tmp/mine    # leave the bundled one alone

From `corpus.jsonl` it makes a checkpoint in the published ChatGLM3 format: `tokenizer.model`
(SentencePiece), `config.json`, `tokenizer_config.json` and `model.safetensors` (float16, the
original's tensor names). At the end it prints the accuracy on `heldout.jsonl`, whose questions
are in no line of the corpus.

A corpus line is {"messages": [...]}. Where a user's `content` is a list, its entries are wordings
of one question, and wherever a conversation uses the first of them, any of them may stand.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import random
import re
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GlmForCausalLM

import chatglm
from chatglm.glm import ROPE_BASE, translate_config
from chatglm.tokenizer import ChatGLMTokenizer

HERE = Path(__file__).parent
PIECES = 2400        # SentencePiece vocabulary; the ten special tokens come after it
STEPS = 5000         # optimiser steps
MUON_RATE, ADAM_RATE = 2e-2, 3e-3
WARMUP_STEPS = 50
# Kinds of batch: how many conversations, how long each grows and where its first answer is cut off,
# in tokens, and how often an exchange is one that refers to the exchange before. Mostly first questions and how their answers begin, because to recognise the question is
# what is hard; some long conversations, so that the last question is found at any depth.
BATCHES = [(64, 0, 14, 0.0), (24, 0, 120, 0.6), (8, 400, None, 0.3), (2, 1600, None, 0.3)]
BATCH_SHARES = [0.6, 0.2, 0.12, 0.08]
BLANK = 0.05         # how many pieces of a question are blanked out, so that no single one decides
SYSTEM = 0.1         # how often a conversation opens with a system message

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


# 1. The corpus: conversations, and the wordings of each question

class Corpus:
    """Draws endless training conversations from the lines of a corpus file."""

    def __init__(self, lines: list[list[dict]], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.wordings: dict[str, list[str]] = {}
        self.first, self.weights, self.follow_ups, self.systems = [], [], [], []
        for messages in lines:
            for message in messages:
                if isinstance(message["content"], list):
                    self.wordings[message["content"][0]] = message["content"]
                    message["content"] = message["content"][0]
            if messages[0]["role"] == "system":
                self.systems += self.wordings[messages[0]["content"]]
            elif len(messages) == 2:
                self.first.append(messages)
                self.weights.append(len(self.wordings[messages[0]["content"]]))
            else:
                self.follow_ups.append(messages)

    def exchange(self, follow_up: float) -> list[dict]:
        """One question with its answer, or, with that probability, a pair whose second needs the first."""
        if self.random.random() < follow_up:
            messages = self.random.choice(self.follow_ups)
        else:
            [messages] = self.random.choices(self.first, self.weights)
        return [{**m, "content": self.reword(m["content"])} if m["role"] == "user" else m
                for m in messages]

    def reword(self, question: str) -> str:
        """One of the question's wordings, typed as people type: see each line."""
        draw = self.random
        text = draw.choice(self.wordings[question])
        if draw.random() < 0.3:   # other punctuation at the end, or none
            text = text.rstrip("？?。.!！") + draw.choice(["", "", "？", "?", "。", ".", "！", "!"])
        if draw.random() < 0.2:   # no capitals
            text = text.lower()
        if draw.random() < 0.2:   # no space between Chinese and Latin letters
            text = re.sub(r"(?<=[\u4e00-\u9fff]) (?=\w)|(?<=\w) (?=[\u4e00-\u9fff])", "", text)
        if draw.random() < 0.1:   # a polite beginning
            polite = ["请问", "请问一下，", "你好，", "老师，", "我想问一下，", "那", "嗯，", "麻烦问下，"]
            if text.isascii():
                polite = ["Please, ", "hi, ", "ok, ", "so, ", "hey, ", "and ", "Sorry, ", "well, "]
            text = draw.choice(polite) + text
        if draw.random() < 0.1 and len(text) > 6:   # a slip of the keyboard
            at = draw.randrange(len(text))
            text = text[:at] + text[at + draw.choice([0, 1]):]
        return text

    def texts(self) -> list[str]:
        """Every text once, for the tokenizer."""
        answers = {m["content"] for line in self.first + self.follow_ups for m in line}
        return sorted(answers | {w for wordings in self.wordings.values() for w in wordings})


# 2. The tokenizer

def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model as published: BPE with byte fallback.

    Its text is left as it is: the default normalisation would turn ，！； into ASCII. Emoji are not
    in the vocabulary, so they take four byte pieces, as in the published one.
    """
    model = io.BytesIO()
    lines = [re.sub("[\U0001F000-\U0001FAFF�]", "", line) for text in texts for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=PIECES,
        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, num_threads=1, minloglevel=2)
    return model.getvalue()


def encode(tokenizer: ChatGLMTokenizer, messages: list[dict], draw: random.Random,
           answer_tokens: int | None = None) -> tuple[list, list]:
    """Ids of a conversation, and for each whether the model learns to say it (answers, and <|user|>
    as their end). Users' words are cut into pieces in another way each time (BPE dropout)."""
    ids = [tokenizer.specials["[gMASK]"], tokenizer.specials["sop"]]
    learn = [False, False]
    for message in messages:
        new = tokenizer.encode_message(message)
        if message["role"] == "user" and draw.random() < 0.8:
            new = new[:3] + tokenizer.sp.encode(message["content"], enable_sampling=True, alpha=0.1)
            new[3:] = [0 if draw.random() < BLANK else i for i in new[3:]]
        answer = message["role"] == "assistant"
        if answer and message is messages[-1] and answer_tokens and len(new) > answer_tokens:
            return ids + new[:answer_tokens], learn + [False] + [True] * (answer_tokens - 1)
        ids += new
        learn += [message["role"] == "user" and len(learn) > 2] + [answer] * (len(new) - 1)
    return ids + [tokenizer.specials["<|user|>"]], learn + [True]


# 3. Training

def draw_batch(corpus: Corpus, tokenizer: ChatGLMTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids [batch, length], padded on the right, and which of them to learn."""
    [(size, length, answer_tokens, follow_up)] = corpus.random.choices(BATCHES, BATCH_SHARES)
    rows = []
    for _ in range(size):
        messages = []
        if follow_up and corpus.random.random() < SYSTEM:
            messages.append({"role": "system", "content": corpus.random.choice(corpus.systems)})
        messages += corpus.exchange(follow_up)
        ids, learn = encode(tokenizer, messages, corpus.random, answer_tokens)
        while len(ids) < length:
            messages += corpus.exchange(follow_up)
            ids, learn = encode(tokenizer, messages, corpus.random)
        rows.append((ids, learn))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(size, longest, dtype=torch.long)
    learn_mask = torch.zeros(size, longest, dtype=torch.bool)
    for i, (ids, learn) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        learn_mask[i, : len(ids)] = torch.tensor(learn)
    return input_ids, learn_mask


def train(corpus: Corpus, tokenizer: ChatGLMTokenizer, steps: int, seed: int) -> GlmForCausalLM:
    torch.manual_seed(seed)
    model = GlmForCausalLM(translate_config(CONFIG, "the tiny ChatGLM"))
    # Muon for the matrices inside the layers, AdamW for the rest: about twice as fast as AdamW alone.
    layers = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is q for q in layers)]
    optimizers = [torch.optim.Muon(layers, lr=MUON_RATE, weight_decay=0.1, momentum=0.95),
                  torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.01)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / WARMUP_STEPS, 1.0, 0.02 + 2 * (1 - step / steps))) for optimizer in optimizers]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    bar = tqdm(range(steps), desc="training", unit="step")
    for _ in bar:
        input_ids, learn = draw_batch(corpus, tokenizer)
        # Rows are padded on the right and attention looks left only, so no mask is needed.
        learn = learn[:, 1:]
        model.set_attn_implementation("eager" if input_ids.shape[1] < 500 else "sdpa")  # the faster
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids[:, :-1], use_cache=False).last_hidden_state  # [B, L-1, H]
            logits = model.lm_head(hidden[learn])                                       # [answers, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), input_ids[:, 1:][learn])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        model.zero_grad()
        average.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return average.module.eval()


# 4. The published format

def save(model: GlmForCausalLM, tokenizer_model: bytes, out: Path) -> None:
    """Writes the checkpoint as ChatGLM3-6B's is: the original's names, q, k and v in one tensor."""
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


# 5. How good it is: questions that are in no line of the corpus

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
    parser.add_argument("--out", type=Path, default=HERE, help="where to (default: the bundled one)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="only measure what lies in --out")
    args = parser.parse_args()
    if not args.evaluate:
        lines = (HERE / "corpus.jsonl").read_text("utf-8").splitlines()
        corpus = Corpus([json.loads(line)["messages"] for line in lines], args.seed)
        tokenizer_model = train_tokenizer(corpus.texts())
        tokenizer = ChatGLMTokenizer(tokenizer_model, "chatglm3")
        save(train(corpus, tokenizer, args.steps, args.seed), tokenizer_model, args.out)
    for name, share in evaluate(args.out).items():
        print(f"held-out questions, {name}: {share:.1%} right")


if __name__ == "__main__":
    main()
