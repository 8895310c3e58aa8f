"""Conversations as question and answer, for the chat formats that have no other roles."""

from __future__ import annotations


def to_rounds(messages: list[dict], between: str) -> list[tuple[str, str]]:
    """(question, answer) of each round; the last answer is empty, and the model's to give.

    These formats have no system role: a system message stands in front of the question after it,
    with `between` behind it. Raises ValueError for what has no place in such a conversation.

    >>> to_rounds([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], " ")
    [('a b', '')]
    """
    rounds: list[tuple[str, str]] = []
    preface = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if message.get("tools") or message.get("metadata"):
            raise ValueError("this chat format has no tools: leave out tools and their calls")
        if role == "system":
            preface += content + between if content else ""
        elif role == "user":
            rounds.append((preface + content, ""))
            preface = ""
        elif role == "assistant" and rounds:
            question, answer = rounds[-1]
            rounds[-1] = (question, answer + between + content if answer else content)
        else:
            raise ValueError(
                f"role {role!a} has no place here: this chat format has system, user and "
                "assistant in turn, and no tools (observation)"
            )
    if preface or not rounds:
        raise ValueError(
            "role 'system' must come before a user message: this chat format has no other place "
            "for what it says"
        )
    return rounds
