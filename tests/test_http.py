"""HTTP as clients really speak it: offers to upgrade, HTTP/1.0, HEAD, request ids.

pytest tests/test_http.py
"""

import json
import os
import shutil
import socket
import subprocess

import pytest
import requests

from tests.servers import BARE, HERE, LIMIT, health, until

BODY = {"prompt": "hello", "temperature": 0}
V1 = "/v1/chat/completions"
MESSAGES = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
OFFER = (
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
)


def exchange(url, *pieces):
    """What the server sends to these bytes until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), LIMIT) as connection:
        for piece in pieces:
            connection.sendall(piece.encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def post(path, body, *headers, version="1.1"):
    body = json.dumps(body)
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: localhost",
        *headers,
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines) + "\r\n\r\n" + body


def answer(url):
    return requests.post(url, json={**BODY, "stream": False}, timeout=LIMIT).json()["response"]


# --- 1. Offers to upgrade ------------------------------------------------------------------------


@pytest.fixture(params=["python api.py", "uvicorn api:app"])
def either_url(request, url):
    """The server, started in both ways."""
    if request.param == "python api.py":
        yield url
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uvicorn = shutil.which("uvicorn")
    process = subprocess.Popen([uvicorn, "api:app", "--port", str(port)], cwd=HERE, env=BARE)
    try:
        until(lambda: can_answer(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def can_answer(url):
    try:
        return health(url)["status"] == "ok"
    except requests.ConnectionError:
        return False


def test_a_body_is_read_although_its_request_offers_to_upgrade(either_url):
    stream_false = {**BODY, "stream": False}
    request = post("/", stream_false, *OFFER.splitlines())
    last = post("/", stream_false, "Connection: close")
    whole = exchange(either_url, request + last)
    in_pieces = exchange(either_url, *request, last)
    assert whole.count(answer(either_url)) == in_pieces.count(answer(either_url)) == 4
    assert whole.count("HTTP/1.1 200") == 2


@pytest.mark.skipif(
    not (shutil.which("curl") or "CI" in os.environ), reason="there is no curl here"
)
@pytest.mark.parametrize("path, body", [("/", BODY), (V1, MESSAGES), ("/stream", BODY)])
def test_curl_with_http2_gets_the_answer(url, path, body):
    body = {**body, "stream": path == "/stream"}
    command = ["curl", "-sS", "--http2", url + path, "-d", json.dumps(body)]
    said = subprocess.run(command, capture_output=True, check=True, timeout=LIMIT).stdout.decode()
    assert answer(url) in said or (path == "/stream" and said.rstrip().count("[DONE]") == 1)


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Ask {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int i = 0; i < 3; i++) {
            var body = HttpRequest.BodyPublishers.ofString(arguments[1]);
            var request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
            var response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.version());
            System.out.println(response.body());
        }
    }
}
"""


@pytest.mark.skipif(
    not (shutil.which("java") or "CI" in os.environ), reason="there is no Java here"
)
@pytest.mark.parametrize("path, body", [("/", BODY), (V1, MESSAGES), ("/stream", BODY)])
def test_javas_http_client_gets_the_answer(url, tmp_path, path, body):
    (tmp_path / "Ask.java").write_text(JAVA, "utf-8")
    command = ["java", str(tmp_path / "Ask.java"), url + path, json.dumps(body)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert said.stdout.count("200 HTTP_1_1") == 3, said.stderr
    if path != "/stream":
        assert said.stdout.count(answer(url)) >= 3


def test_a_websocket_is_told_that_there_is_none(url):
    offer = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"
    said = exchange(
        url,
        f"GET /health HTTP/1.1\r\nHost: localhost\r\n{offer}\r\n\r\n",
        post("/", BODY, "Connection: close"),
    )
    assert said.startswith("HTTP/1.1 200 OK") and said.count("HTTP/1.1 200 OK") == 2


def test_of_requests_that_came_at_once_none_goes_on_when_the_client_leaves(server):
    asked = post("/", {**BODY, "prompt": "Count from 1 to 100", "stream": False})
    host, port = server.url.removeprefix("http://").split(":")
    with server.held():
        with socket.create_connection((host, int(port)), LIMIT) as connection:
            connection.sendall(3 * asked.encode())
            until(lambda: health(server.url)["active"] == 1)
        until(lambda: health(server.url)["active"] == 0)  # without a step of the model


# --- 2. HTTP/1.0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, body", [("/", BODY), ("/stream", BODY), (V1, {**MESSAGES, "stream": True})]
)
def test_a_client_of_http_1_0_gets_no_chunks(either_url, path, body):
    head, _, text = exchange(either_url, post(path, body, version="1.0")).partition("\r\n\r\n")
    assert "chunked" not in head and "connection: close" in head
    in_chunks = requests.post(either_url + path, json=body, timeout=LIMIT)
    if path == "/":
        assert text.rpartition("<^>")[2] == answer(either_url)
        assert text.startswith("<^>") and "\r\n" not in text
    else:
        assert text.endswith("data: [DONE]\n\n") or "[DONE]\nid" in text
        assert text.startswith(in_chunks.text[:8])


def test_an_answer_that_breaks_off_does_not_look_whole_in_http_1_0(server):
    asked = post("/", {**BODY, "prompt": "Count from 1 to 100"}, version="1.0")
    server.may_fail = True
    with server.held():
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), LIMIT) as connection:
            connection.sendall(asked.encode())
            until(lambda: health(server.url)["active"] == 1)
            server.let(9)  # the first few are hidden
            received = b""
            while b"<^>1" not in received:
                received += connection.recv(65536)
            (server.folder / "RuntimeError").touch()
            server.let(1)
            with pytest.raises(ConnectionResetError):
                while piece := connection.recv(65536):
                    received += piece
    assert b"content-length" not in received.lower()


def test_a_client_of_http_1_0_that_leaves_writes_nothing_to_the_log(server):
    asked = post("/", {**BODY, "prompt": "Count from 1 to 100"}, version="1.0")
    host, port = server.url.removeprefix("http://").split(":")
    before = len(server.log())
    with server.held():
        with socket.create_connection((host, int(port)), LIMIT) as connection:
            connection.sendall(asked.encode())
            until(lambda: health(server.url)["active"] == 1)
            server.let(9)
            connection.recv(65536)
        until(lambda: server.step() or health(server.url)["active"] == 0)
    assert "Traceback" not in server.log()[before:]


def test_a_whole_answer_has_its_length_in_http_1_0_too(url):
    said = exchange(url, post("/", {**BODY, "stream": False}, version="1.0"))
    head, _, body = said.partition("\r\n\r\n")
    assert f"content-length: {len(body.encode())}" in head
    assert json.loads(body)["response"] == answer(url)
