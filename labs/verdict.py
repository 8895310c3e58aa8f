"""What a check says: one sentence, in Chinese and in English."""


class Wrong(Exception):
    """The student's program does not do it yet; the sentences say what is wrong."""

    def __init__(self, zh: str, en: str) -> None:
        super().__init__(f"{zh}\n{en}")


def require(condition: object, zh: str, en: str) -> None:
    if not condition:
        raise Wrong(zh, en)
