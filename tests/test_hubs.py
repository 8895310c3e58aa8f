"""Downloads, from a local server that speaks the protocols of both hubs."""

import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest

import chatglm
from tests.original import GOLDEN, golden_config, publish, random_state

NAME = "someone/chatglm-made-up"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, chatglm
tokenizer, model = chatglm.load(sys.argv[1], device="cpu", adapter=sys.argv[2] or None)
print(tokenizer.chat_format, sum(p.numel() for p in model.parameters()))
"""
needs_modelscope = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="pip install modelscope-hub"
)


class Hub(http.server.BaseHTTPRequestHandler):
    """Files of `folder` in the formats of both hubs. `server.breaks` cuts the next large file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        names = sorted(path.name for path in self.server.folder.iterdir())
        if url.path.endswith("/repo/files"):  # ModelScope
            files = [self.describe(name) for name in names]
            return self.reply(json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}))
        if "FilePath" in url.query:
            return self.send(urllib.parse.parse_qs(url.query)["FilePath"][0])
        if url.path.startswith(f"/api/models/{NAME}"):  # Hugging Face
            if "/tree/" in url.path:
                return self.reply(json.dumps([self.describe(name) for name in names]))
            siblings = [{"rfilename": name} for name in names]
            return self.reply(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}))
        if match := re.fullmatch(rf"/{NAME}/resolve/\w+/(.+)", url.path):
            return self.send(match[1])
        return self.reply("{}", 404)

    do_HEAD = do_POST = do_GET

    def describe(self, name):
        content = (self.server.folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        both = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
        return both | {"Path": name, "Type": "blob", "Size": len(content), "Sha256": digest}

    def send(self, name):
        file = self.server.folder / name
        if not file.is_file():
            return self.reply("", 404)
        content, begin = file.read_bytes(), 0
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            content = content[begin : end + 1]
        headers["Accept-Ranges"] = "bytes"
        self.reply(content, 206 if wanted else 200, headers)

    def reply(self, content, status=200, headers=()):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.breaks and len(content) > 100_000:
            self.server.breaks -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked, server.breaks = GOLDEN / "chatglm3", [], 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.load = functools.partial(run, server, tmp_path)
        yield server
        server.shutdown()


def run(server, home, name=NAME, adapter="", **env):
    address = f"http://127.0.0.1:{server.server_port}"
    places = {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    places |= {"MODELSCOPE_ENDPOINT": address, "MODELSCOPE_CACHE": str(home / "modelscope")}
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name, adapter],
        env=kept | places | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"} | env,
        text=True,
        capture_output=True,
        timeout=120,
        cwd=GOLDEN.parent.parent,
    )
    return done.stdout if done.returncode == 0 else done.stderr


HUBS = [NAME, pytest.param(f"modelscope:{NAME}", marks=needs_modelscope)]


@pytest.mark.parametrize("name", HUBS)
def test_a_checkpoint_is_downloaded_without_its_code(hub, tmp_path, name):
    folder = tmp_path / "published"
    folder.mkdir()
    for file in (GOLDEN / "chatglm3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('run')")
    hub.folder = folder
    assert hub.load(name).startswith("chatglm3 ")
    assert not any("modeling" in path for _, path, _ in hub.asked)


@pytest.mark.parametrize("name", HUBS)
def test_what_was_downloaded_needs_no_network(hub, name):
    first = hub.load(name)
    hub.shutdown()
    hub.server_close()
    assert hub.load(name, HF_HUB_OFFLINE="1") == first


@pytest.mark.parametrize("name", HUBS)
def test_a_download_that_broke_off_goes_on_where_it_was(hub, tmp_path, name):
    config = golden_config(padded_vocab_size=50_000)  # the clients write 10 MB at a time
    publish(tmp_path / "large", config, random_state(config))
    hub.folder, hub.breaks = tmp_path / "large", 1
    said = hub.load(name)
    if not said.startswith("chatglm3 "):  # a client may leave it to the next start
        said = hub.load(name)
    assert said.startswith("chatglm3 "), said
    ranges = [wanted for _, path, wanted in hub.asked if "safetensors" in path and wanted]
    assert any(not wanted.startswith("bytes=0-") for wanted in ranges), hub.asked


@pytest.mark.parametrize("name", HUBS)
def test_a_bin_is_taken_where_there_are_no_safetensors(hub, name):
    hub.folder = GOLDEN / "chatglm2-int4"
    assert hub.load(name).startswith("chatglm2 ")


@pytest.mark.parametrize("name", HUBS)
def test_an_adapter_is_downloaded_too(hub, name):
    hub.folder = GOLDEN / "chatglm3-lora"
    assert hub.load(str(GOLDEN / "chatglm3"), name).startswith("chatglm3 ")


@needs_modelscope
def test_the_owner_says_that_it_is_on_modelscope(hub):
    assert hub.load("ZhipuAI/chatglm3-6b").startswith("chatglm3 ")
    assert any("/api/v1/models/ZhipuAI/chatglm3-6b/" in path for _, path, _ in hub.asked)
    assert not any("/resolve/" in path for _, path, _ in hub.asked)


@pytest.mark.parametrize("name", ["no/such", pytest.param("ZhipuAI/none", marks=needs_modelscope)])
def test_what_the_hub_does_not_have_is_told_in_one_line(hub, tmp_path, name):
    hub.folder = tmp_path
    last = hub.load(name).splitlines()[-1]
    assert last.startswith("ValueError: ") and "pass its folder" in last, last


def test_without_its_client_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ValueError, match="pip install modelscope-hub"):
        chatglm.load("modelscope:ZhipuAI/chatglm3-6b", device="cpu")
