"""Lab 10: questions of one's own, and a model that has learned them."""

import json
from pathlib import Path

from labs.verdict import Wrong, require

PAIRS, SHARE = 20, 0.9
CORPUS = Path(__file__).parents[2] / "chatglm" / "tiny" / "corpus.jsonl"


def check(file: Path, model: Path | None = None) -> None:
    from chatglm.tiny.finetune import read_questions, shares

    try:
        pairs = read_questions(file)
    except ValueError as error:
        zh, _, en = str(error).partition(" / ")
        place = f"{str(error).split(': ')[0]}: " if en else ""
        raise Wrong(zh, place + (en or zh)) from None
    require(
        len(pairs) >= PAIRS,
        f"至少要有 {PAIRS} 个问题，这里只有 {len(pairs)} 个。",
        f"At least {PAIRS} questions are needed, and there are {len(pairs)}.",
    )
    known = {wording.lower() for wording in corpus_wordings()}
    for pair in pairs:
        for wording in pair["messages"][0]["content"]:
            require(
                wording.lower() not in known,
                f"模型已经会回答“{wording}”，两个答案会打架：换一个新问题。",
                f"The model already answers {wording!r}, and two answers would fight: ask "
                "something new.",
            )
    require(
        model is not None,
        "文件没有问题。现在微调，再加上 --model 文件夹 检查一次。",
        "The file is right. Now fine-tune, and check again with --model FOLDER.",
    )
    require(
        (model / "config.json").is_file(),
        f"{model} 里没有模型。",
        f"There is no model in {model}.",
    )
    new = shares(model, pairs, only="new, wordings")["new, wordings kept back"]
    require(
        new >= SHARE,
        f"没学过的问法只答对 {new:.0%}，要到 {SHARE:.0%}：给每个问题多写几种问法。",
        f"Of the wordings kept back it gets {new:.0%} right, not {SHARE:.0%}: write more wordings "
        "of each question.",
    )
    old = shares(model, pairs, only="old")["old, held-out wordings"]
    require(
        old >= 0.8,
        f"它忘了原来会的：旧问题只答对 {old:.0%}。",
        f"It has forgotten what it knew: {old:.0%} of the old questions are right.",
    )


def corpus_wordings() -> list[str]:
    """The questions of the corpus that have an answer; "I do not know" may be replaced."""
    wordings = []
    for line in CORPUS.read_text("utf-8").splitlines():
        messages = json.loads(line).get("messages", [])
        known = [message.get("content") for message in messages if message["role"] == "user"]
        if len(messages) == 2 and isinstance(known[0], list) and len(known[0]) < 100:
            wordings += known[0]
    return wordings
