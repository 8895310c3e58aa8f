"""Questions of one's own for the tiny ChatGLM: what is refused, what is drawn, what is written."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import chatglm
from chatglm.tiny import finetune
from chatglm.tiny.train import HERE, save, train

EXAMPLE = Path(__file__).parents[1] / "labs" / "solutions" / "my_questions.jsonl"


def line(wordings, answer="A", roles=("user", "assistant")):
    contents = zip(roles, (wordings, answer))
    return json.dumps({"messages": [{"role": role, "content": c} for role, c in contents]})


SIX = list("abcdef")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ("{", "my.jsonl:1.*not JSON"),
        ("[]", 'my.jsonl:1.*"messages" must hold two entries'),
        (line(SIX, roles=("user", "user")), "of the roles user and assistant"),
        (line(SIX[:5]), "at least 6 different wordings, and this one has 5"),
        (line([*SIX[:5], "a"]), "at least 6 different wordings, and this one has 5"),
        (line("one"), "at least 6 different wordings, and this one has 1"),
        (line([*SIX, 7]), "the wordings must be texts"),
        (line(SIX, answer=" "), "the answer must be a text, not ' '"),
        (line(SIX) + "\n" + line([*"ghijk", "f"]), "a wording of two questions at once: 'f'"),
    ],
)
def test_a_file_that_cannot_be_learned_is_refused_with_its_line(text, says, tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=says):
        finetune.read_questions(file)


def test_half_of_what_is_drawn_is_new_and_no_last_wording_is_learned():
    pairs = finetune.read_questions(EXAMPLE)
    corpus = finetune.mixed(pairs, seed=0)
    new = {pair["messages"][1]["content"] for pair in pairs}
    drawn = Counter(corpus.exchange(follow_up=0)[1]["content"] in new for _ in range(2000))
    assert 0.4 < drawn[True] / 2000 < 0.6
    known = {wording for wordings in corpus.wordings.values() for wording in wordings}
    for pair in pairs:
        *learned, kept_back = pair["messages"][0]["content"]
        assert known.issuperset(learned) and kept_back not in known


def test_a_step_of_it_changes_the_weights_and_what_is_written_can_be_served(tmp_path):
    torch.manual_seed(0)
    tokenizer, model = finetune.load_bundled()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    corpus = finetune.mixed(finetune.read_questions(EXAMPLE), seed=0)
    trained = train(
        model, corpus, tokenizer, finetune.BATCHES, 1, finetune.RATE, 0, 0.0, finetune.HALF
    )
    assert any(not torch.equal(before[n], w) for n, w in trained.state_dict().items())
    save(trained.eval(), (HERE / "tokenizer.model").read_bytes(), tmp_path)
    loaded, served = chatglm.load(tmp_path, device="cpu")
    assert served.chat(loaded, "什么是 HTTP？", temperature=0)[0].startswith("HTTP")


@pytest.mark.parametrize("program", ["finetune", "train"])
def test_the_bundled_model_is_not_written_over_unless_told(program, monkeypatch, capsys):
    module = __import__(f"chatglm.tiny.{program}", fromlist=["main"])
    arguments = {"finetune": [str(EXAMPLE), "--out", str(HERE)], "train": []}[program]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert "--out" in capsys.readouterr().err
