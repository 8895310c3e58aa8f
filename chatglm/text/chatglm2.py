"""The prompt of ChatGLM2, which is one text."""

from __future__ import annotations

from chatglm.text.rounds import to_rounds


def chatglm2_prompt(messages: list[dict]) -> str:
    """`[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]\\n\\n问：…\\n\\n答：` (published
    `build_prompt`)."""
    rounds = [
        f"[Round {number}]\n\n问：{question}\n\n答：{answer}"
        for number, (question, answer) in enumerate(to_rounds(messages, between="\n\n"), start=1)
    ]
    return "\n\n".join(rounds)
