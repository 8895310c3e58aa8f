"""Conversations as question and answer, for the chat formats that have no other roles."""

from __future__ import annotations


def to_rounds(messages: list[dict], between: str) -> list[tuple[str, str]]:
    """(question, answer) of each round; the last answer is empty, and the model's to give.

    These formats have no system role: a system message stands in front of the question after it,
    with `between` behind it. Raises ValueError for what has no place in such a conversation.

    >>> to_rounds([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], " ")
    [('a b', '')]
    """
    # Joined at the end: a text that grows message by message would be copied each time.
    rounds: list[tuple[str, list[str]]] = []
    preface: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if message.get("tools") or message.get("metadata"):
            raise ValueError("this chat format has no tools: leave out tools and their calls")
        if role == "system":
            preface += [content, between] if content else []
        elif role == "user":
            rounds.append(("".join([*preface, content]), []))
            preface = []
        elif role == "assistant" and rounds:
            answer = rounds[-1][1]
            if answer:
                answer += [between, content]
            elif content:
                answer.append(content)
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
    return [(question, "".join(answer)) for question, answer in rounds]
