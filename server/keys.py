"""The keys that clients must send. Whatever is unclear about them ends the start of the server."""

from __future__ import annotations

import os
import re
from pathlib import Path

COMMENT = re.compile(r"(?:^|\s)#.*")  # a # within a key is part of it
# Of a name that is no file: what it begins or ends with where a file was meant, not a key.
LOOKS_LIKE_A_FILE = re.compile(
    r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|.*\.(?:txt|keys?|conf|cfg|env|ini|json|list|pem|ya?ml)$"
)


def read_keys(api_key: str | None, file: str | None) -> list[bytes]:
    """The keys of --api-key and --api-key-file. Raises ValueError, naming the flag, if one of them
    is given and has no key, and OSError if there is no such file."""
    keys: list[str] = []
    if api_key is not None:
        keys += keys_in(api_key)
    if file is not None:
        keys += keys_of_file(Path(file), "--api-key-file")
    return [key.encode() for key in keys]


def keys_in(api_key: str) -> list[str]:
    """One key or more, with spaces between them; or `@file`, or the name of a file."""
    if api_key.startswith("@"):
        return keys_of_file(Path(api_key[1:]), "--api-key")
    if os.path.isfile(api_key):
        return keys_of_file(Path(api_key), "--api-key")
    folder = os.path.dirname(api_key)
    if LOOKS_LIKE_A_FILE.match(api_key) or (folder and os.path.isdir(folder)):
        raise ValueError(
            "argument --api-key: looks like the name of a file, and there is none; "
            "a key that looks like this can be written into a file, for --api-key-file"
        )
    if not api_key.split():
        raise ValueError("argument --api-key: contains no key")
    return api_key.split()


def keys_of_file(path: Path, flag: str) -> list[str]:
    """One key a line; from # on, at its beginning or after a space, a line is a comment."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"argument {flag}: {path} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = COMMENT.sub("", line).split()
        if len(words) > 1:
            raise ValueError(
                f"argument {flag}: line {number} of {path} has {len(words)} words; "
                "write one key a line, and comments after #"
            )
        keys += words
    if not keys:
        raise ValueError(f"argument {flag}: {path} contains no key")
    return keys
