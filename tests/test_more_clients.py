"""Clients that need an environment of their own: LiteLLM, instructor, LlamaIndex, OpenAI's on node,
and OkHttp, which Debian has as libokhttp-java.

python3 -m venv tests/clients/.venv
tests/clients/.venv/bin/pip install -r tests/clients/requirements.txt
npm install --prefix tests/clients
pytest tests/test_more_clients.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import requests

from tests.servers import LIMIT, busy, until

CLIENTS = Path(__file__).parent / "clients"
PYTHON = CLIENTS / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
HTTP = "HTTP 是网页和接口使用的通信协议：客户端发出请求，服务器返回一个响应。"
CALLED = ["get_weather", {"city": "上海"}]


def output(program, url, installed, *command):
    if not installed.exists() and "CI" not in os.environ:
        pytest.skip("not installed; the first lines of this file tell how")
    done = subprocess.run(
        [*command, CLIENTS / program, url],
        capture_output=True,
        timeout=LIMIT,
        cwd=CLIENTS,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def run(program, url, installed=PYTHON, command=PYTHON):
    """What the program tells, in JSON."""
    return json.loads(output(program, url, installed, command).splitlines()[-1])


def text_of(url):
    """How a text goes on."""
    asked = {"prompt": "1, 2, 3,", "max_tokens": 8, "temperature": 0}
    reply = requests.post(url + "/v1/completions", json=asked, timeout=LIMIT)
    return reply.json()["choices"][0]["text"]


def is_person(value):
    return set(value) == {"name", "age"} and isinstance(value["age"], int)


def test_litellm(url):
    told = run("litellm_client.py", url)
    assert told["whole"] == told["streamed"] == HTTP and told["finish_reason"] == "stop"
    assert told["called"] == CALLED and is_person(told["formed"])
    assert told["text"] == text_of(url)


def test_instructor_gets_an_object_of_the_class_each_time(url):
    for weather in run("instructor_client.py", url).values():
        assert weather["unit"] in ("celsius", "fahrenheit") and isinstance(weather["days"], list)


def test_llama_index(url):
    told = run("llama_index_client.py", url)
    assert told["whole"] == told["streamed"] == told["completed"] == HTTP
    assert told["called"] == "上海: 25" and is_person(told["formed"])


def test_openai_on_node(url):
    told = run("openai_sdk.mjs", url, installed=CLIENTS / "node_modules", command="node")
    assert told["whole"] == told["streamed"] == HTTP and told["finish_reason"] == "stop"
    assert told["called"] == CALLED and is_person(told["formed"])
    assert told["text"] == text_of(url)
    assert told["refused"] == "BadRequestError 400 temperature"
    until(lambda: busy(url) == 0)  # it hung up in the middle of counting


def test_okhttp(url):
    jars = [Path("/usr/share/java") / name for name in ("okhttp.jar", "okio.jar")]
    java = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]
    path = os.pathsep.join(map(str, jars))
    told = output("OkHttp.java", url, jars[0], *java, "-cp", path)
    assert "several reads: true" in told and f"answer: {HTTP}" in told
    assert "last event: data: [DONE]" in told
    assert "refused: 400" in told and "temperature must be" in told
    assert "cancelled" in told
    until(lambda: busy(url) == 0)
