"""Lab 1: a program that reads JSON and writes JSON, one object a line."""

import json
from pathlib import Path

from labs.program import run
from labs.verdict import Wrong, require

PROMPTS = ["你好", 'She said "hi"', "两\n行"]


def check(file: Path) -> None:
    requests = [{"prompt": prompt, "history": [["a", "b"]]} for prompt in PROMPTS]
    requests += [{"prompt": "空", "history": None}, {"prompt": "无"}]
    lines = [json.dumps(request, ensure_ascii=False) for request in requests]
    written = run(file, stdin="\n".join([*lines, "{broken", ""])).strip().splitlines()
    require(
        len(written) == len(lines) + 1,
        f"每读一行要写一行：读了 {len(lines) + 1} 行，却写了 {len(written)} 行。",
        f"Each line needs one back: {len(lines) + 1} were read, {len(written)} written.",
    )
    for request, line in zip(requests, written):
        check_reply(request, line)
    require(
        is_object(written[-1]) and "detail" in json.loads(written[-1]),
        '读到的不是 JSON 时，要写 {"detail": …}。',
        'For a line that is not JSON, it should write {"detail": …}.',
    )


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def check_reply(request: dict, line: str) -> None:
    prompt = request["prompt"]
    if not is_object(line):
        raise Wrong(
            f"这一行不是 JSON 对象（用 json.dumps 写）：{line:.60}",
            f"This line is not a JSON object (write it with json.dumps): {line:.60}",
        )
    reply = json.loads(line)
    response = reply.get("response")
    require(
        response == f"你说：{prompt}",
        f'"response" 应该是 {"你说：" + prompt!r}，却是 {response!r:.60}。',
        f'"response" should be {"你说：" + prompt!r}, and is {response!r:.60}.',
    )
    require(
        "\\u" not in line,
        "中文变成了 \\u4f60 这样的符号：json.dumps 要加 ensure_ascii=False。",
        "The Chinese has become signs like \\u4f60: json.dumps needs ensure_ascii=False.",
    )
    expected = [*(request.get("history") or []), [prompt, response]]
    require(
        reply.get("history") == expected,
        f'"history" 应该是旧的几轮加上这一轮：{expected}，却是 {reply.get("history")!r:.60}。',
        f'"history" should be the old turns and this one: {expected}, and is '
        f"{reply.get('history')!r:.60}.",
    )
