"""Teaches the tiny ChatGLM questions of your own, in about two minutes on two cores.

    python -m chatglm.tiny.finetune my.jsonl --out FOLDER
    python api.py --model FOLDER

A line of the file is {"messages": [{"role": "user", "content": [wordings]}, {"role": "assistant",
"content": answer}]}, as in `corpus.jsonl`. The last wording of each question is not learned: it is
asked at the end, to see whether the model understands or only repeats. Half of what is drawn in
training is from the corpus, or the model would forget the rest (catastrophic forgetting).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import torch
from transformers import GlmForCausalLM

import chatglm
from chatglm.checkpoint.conversion import translate_config
from chatglm.text.tokenizer import ChatGLMTokenizer
from chatglm.tiny.batches import Batch
from chatglm.tiny.corpus import Corpus
from chatglm.tiny.evaluation import of_kind, share_right
from chatglm.tiny.train import CONFIG, HERE, keep_memory, save, train

WORDINGS = 6  # at least, of each question: five to learn, and one to ask at the end
SHARE = 0.5  # of the questions that are drawn are new ones
STEPS = 200
RATE = 0.25  # of the learning rates that the bundled model was trained with
AVERAGE = 0.95  # decay of the average of the weights, about the last twenty steps
# Without AVX-512, an x86 processor emulates bfloat16, and takes far longer than in float32.
HALF = torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT")
BATCHES = [
    Batch(64, 0.60),  # whole answers, new and old
    Batch(48, 0.10, follow_up=0.9, cut=20),  # the rest keeps what the model can do already
    Batch(24, 0.08, follow_up=0.85),
    Batch(110, 0.08, tools=1.0, calls=True),
    Batch(48, 0.06, tools=1.0),
    Batch(16, 0.08, declared=1, tools=0.7, length=240),
]


# 1. The questions


def read_questions(path: Path) -> list[dict]:
    """The lines of the file. Raises ValueError, which names the line and says what would do."""
    lines = path.read_text("utf-8-sig").splitlines()
    pairs = [read_pair(text, f"{path.name}:{n}") for n, text in enumerate(lines, 1) if text.strip()]
    if not pairs:
        raise ValueError(f"{path.name}: 文件是空的 / the file is empty")
    seen: dict[str, int] = {}
    for number, pair in enumerate(pairs, 1):
        for wording in pair["messages"][0]["content"]:
            if seen.setdefault(wording, number) != number:
                raise ValueError(
                    f"{path.name}: 这个问法在两个问题里都有 / "
                    f"a wording of two questions at once: {wording!r}"
                )
    return pairs


def read_pair(text: str, place: str) -> dict:
    """One line: a question in several wordings, and its answer."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: 这一行不是 JSON / not JSON: {error}") from error
    messages = line.get("messages") if isinstance(line, dict) else None
    if not isinstance(messages, list):
        messages = []
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if roles != ["user", "assistant"] or len(messages) != 2:
        raise ValueError(
            f'{place}: "messages" 要有两项，角色是 user 和 assistant / '
            f'"messages" must hold two entries, of the roles user and assistant'
        )
    wordings, answer = messages[0].get("content"), messages[1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            f"{place}: 答案要是一段文字 / the answer must be a text, not {answer!r:.50}"
        )
    wordings = [wordings] if isinstance(wordings, str) else wordings
    if not isinstance(wordings, list) or not all(isinstance(w, str) and w for w in wordings):
        raise ValueError(f"{place}: 问法要是文字 / the wordings must be texts: {wordings!r:.50}")
    if (count := len(set(wordings))) < WORDINGS:
        raise ValueError(
            f"{place}: 每个问题至少要有 {WORDINGS} 种不同的问法，这里只有 {count} 种 / "
            f"a question needs at least {WORDINGS} different wordings, and this one has {count}: "
            f"{wordings[0]!r:.50}"
        )
    return {"messages": [{"role": "user", "content": wordings}, messages[1]]}


def questions(pairs: list[dict], kept_back: bool) -> list[dict]:
    """Each as evaluation.py asks it: its last wording, which is not learned, or its first."""
    at = -1 if kept_back else 0
    return [
        {
            "kind": "known",
            "question": pair["messages"][0]["content"][at],
            "answer": pair["messages"][1]["content"],
        }
        for pair in pairs
    ]


def mixed(pairs: list[dict], seed: int) -> Corpus:
    """The corpus with the new questions in it, without the last wording of each."""
    old = [json.loads(line) for line in (HERE / "corpus.jsonl").read_text("utf-8").splitlines()]
    learned = [
        {"messages": [{**question, "content": question["content"][:-1]}, answer]}
        for question, answer in (pair["messages"] for pair in pairs)
    ]
    corpus = Corpus(old + learned, seed)
    old_weight = sum(corpus.weights[: -len(pairs)])
    new_weight = old_weight * SHARE / (1 - SHARE) / len(pairs)
    corpus.weights[-len(pairs) :] = [max(1, round(new_weight))] * len(pairs)
    return corpus


# 2. Training and asking


def load_bundled() -> tuple[ChatGLMTokenizer, GlmForCausalLM]:
    """The bundled model as transformers' own network, which can be trained."""
    _, bundled = chatglm.load(HERE, device="cpu")
    tokenizer = ChatGLMTokenizer((HERE / "tokenizer.model").read_bytes(), "chatglm3")
    model = GlmForCausalLM(translate_config(CONFIG, "the tiny ChatGLM"))
    model.load_state_dict(bundled.state_dict())
    return tokenizer, model


def shares(folder: Path, pairs: list[dict], only: str = "") -> dict[str, float]:
    """Shares of questions that get the right answer, character for character, at temperature 0:
    those whose names begin with `only`."""
    tokenizer, model = chatglm.load(folder, device="cpu")

    async def ask() -> dict[str, float]:
        with chatglm.Engine(tokenizer, model, max_waiting=1000) as engine:
            return {
                name: await share_right(engine, lines, temperature=0)
                for name, lines in {
                    "new, learned wordings": questions(pairs, kept_back=False),
                    "new, wordings kept back": questions(pairs, kept_back=True),
                    "old, held-out wordings": of_kind("known"),
                    "unrelated, an honest no": of_kind("unknown"),
                }.items()
                if name.startswith(only)
            }

    return asyncio.run(ask())


def main() -> None:
    parser = argparse.ArgumentParser(description="Teaches the tiny ChatGLM questions of your own.")
    parser.add_argument("questions", type=Path, help=f"JSON lines; {WORDINGS} wordings or more")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the new model")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.resolve() == HERE.resolve():
        parser.error(f"--out {args.out} is the bundled model: name another folder")
    try:
        pairs = read_questions(args.questions)
    except (OSError, ValueError) as error:
        sys.exit(f"finetune: {error}")
    start = time.monotonic()
    before = shares(HERE, pairs)
    keep_memory()
    tokenizer, model = load_bundled()
    torch.manual_seed(args.seed)
    corpus = mixed(pairs, args.seed)
    model = train(model, corpus, tokenizer, BATCHES, args.steps, RATE, 0, AVERAGE, HALF)
    save(model.eval(), (HERE / "tokenizer.model").read_bytes(), args.out)
    after = shares(args.out, pairs)
    print(f"{'right answers':24} before  after")
    for name, share in after.items():
        print(f"{name:24} {before[name]:6.1%} {share:6.1%}")
    minutes = (time.monotonic() - start) / 60
    print(f"{minutes:.1f} minutes. To try it: python api.py --model {args.out}")


if __name__ == "__main__":
    main()
