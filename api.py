"""A ChatGLM chat server in one file.

    python api.py                                  # the tiny ChatGLM that comes along
    python api.py --model /models/chatglm3-6b      # published weights: a folder or a hub id
    uvicorn api:app --timeout-graceful-shutdown 1  # the same, set by environment variables

`POST /` streams the answer to a prompt, `/stream` as server-sent events, `/v1/chat/completions`
in OpenAI's format; `GET /` is a page to chat on, `GET /health` says how busy it is, and `/docs`
shows every route. A request's life: (1) its JSON is checked, or refused with a reason; (2) it
waits for a place in the batch; (3) each step of the model takes it a token further, and what there
is now is sent; (4) it ends, or its reader hangs up, and its place is free.
"""

import argparse
import asyncio
import gc
import hmac
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent, format_sse_event
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

import chatglm
from chatglm.text.messages import extend_history, to_messages
from server.bodies import Sampling
from server.openai_api import Completion, Reply, error_object

# --- Settings: flags, each also an environment variable: --log-prompts is CHATGLM_LOG_PROMPTS ----

FLAGS = {  # type, default, least value, what it says
    "model": (str, None, None, "a folder or a hub id (default: the tiny ChatGLM in chatglm/tiny)"),
    "device": (str, "auto", None, "auto, cuda, cuda:1, mps or cpu"),
    "dtype": (str, "auto", None, "auto, bfloat16, float16 or float32"),
    "quantize": (str, None, None, "int8 or int4: smaller weights, for a small GPU"),
    "devices": (int, 1, 1, "GPUs of this machine to share the network out over"),
    "chat-format": (str, None, None, "chatglm2 or chatglm3, where the checkpoint does not say"),
    "host": (str, "127.0.0.1", None, "0.0.0.0 lets other machines in"),
    "port": (int, 8000, 0, "the port to listen on"),
    "api-key": (str, None, None, "the key that clients must send, or a file with one a line"),
    "cors-origin": (str, "", None, "pages that browsers let in: https://a.example,https://b.org"),
    "max-concurrency": (int, 64, 1, "answers under way at once"),
    "max-waiting": (int, 256, 0, "requests that wait for a place; more are refused with 429"),
    "max-length": (int, None, 1, "ceiling for a request's max_length (default: the context)"),
    "max-body": (int, 2**20, 1, "bytes of a request"),
    "timeout": (float, 600.0, 0.1, "seconds one answer may take"),
    "grace": (float, 30.0, 0, "seconds for answers under way to end, after SIGTERM"),
}
UPLOAD_TIMEOUT = 60  # seconds for a body to arrive, or dripping ones would hold connections
RETRY_AFTER = 5  # seconds: by then, some of a full queue's answers have ended
logger = logging.getLogger("chatglm")


def parse_settings(arguments: list[str]) -> argparse.Namespace:
    """What the flags say, else the environment, else the defaults."""
    parser = argparse.ArgumentParser(prog="api.py", description=app.title, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"api.py: {message} (--help lists the flags)\n")
    for name, (kind, default, least, text) in FLAGS.items():
        variable = "CHATGLM_" + name.upper().replace("-", "_")
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=os.environ.get(variable) or default,
            help=f"{text} [{variable}]",
        )
    parser.add_argument(
        "--log-prompts",
        action="store_true",
        help="log what users ask",
        default=os.environ.get("CHATGLM_LOG_PROMPTS", "") not in ("", "0"),
    )
    settings = parser.parse_args(arguments)
    for name, (_, _, least, _) in FLAGS.items():
        value = getattr(settings, name.replace("-", "_"))
        if None not in (least, value) and not value >= least:
            parser.error(f"argument --{name}: must be at least {least}, not {value}")
    key = settings.api_key
    keys = Path(key).read_text("utf-8", "replace") if key and os.path.isfile(key) else key or ""
    settings.keys = [word.encode() for word in keys.split()]
    if key is not None and not settings.keys:
        parser.error("argument --api-key: there is no key in it")
    return settings


# --- Requests --------------------------------------------------------------------------------


class Chat(Sampling):
    """A question, with the turns before it; how to sample the answer is in `Sampling`."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "你好"}})
    prompt: str = Field(description="what the user says")
    history: list = Field([], description='[query, response] pairs, or {"role", "content"} dicts')
    max_length: int = Field(2048, ge=1, description="tokens of prompt and answer; 0 is absent")
    stream: bool = Field(True, description="false: the answer in one piece")

    def to_messages(self) -> list[dict]:
        return to_messages(self.prompt, self.history)

    def settings(self) -> dict:
        return {**self.sampling(), "max_length": self.max_length}


async def receive(request: Request) -> bytes:
    """The whole body. One that is too long is read to its end before it is refused: a sender whose
    connection breaks while it still sends never learns why."""
    limit = request.app.state.settings.max_body
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT):
            async for part in request.stream():
                size += len(part)
                body += part if size <= limit else b""
    except ClientDisconnect as error:
        raise HTTPException(400, "the body broke off") from error
    except TimeoutError as error:
        raise HTTPException(408, f"the body took more than {UPLOAD_TIMEOUT} s") from error
    if size > limit:
        raise HTTPException(413, f"the body has {size} bytes, over {limit}; send less history")
    return bytes(body)


# --- The app ---------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The model runs from before the first request to after the last."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    if not hasattr(app.state, "loaded"):  # under `uvicorn api:app` there was no main()
        load(parse_settings([]))
    gc.freeze()  # what is loaded stays; to look through it takes half a second, also at the end
    limits = {
        name: getattr(app.state.settings, name)
        for name in ("max_concurrency", "max_waiting", "max_length", "timeout")
    }
    with chatglm.Engine(*app.state.loaded, **limits) as app.state.engine:
        yield


def load(settings: argparse.Namespace) -> None:
    app.state.settings = settings
    names = ("model", "device", "dtype", "chat_format", "quantize", "devices")
    app.state.loaded = chatglm.load(*(getattr(settings, name) for name in names))
    ORIGINS[:] = re.split(r"[,\s]+", settings.cors_origin)


app = FastAPI(title="A ChatGLM chat server", lifespan=lifespan)
# Under `uvicorn api:app` the middleware is made before `lifespan` runs, so from the environment.
ORIGINS = re.split(r"[,\s]+", os.environ.get("CHATGLM_CORS_ORIGIN", ""))
app.add_middleware(CORSMiddleware, allow_origins=ORIGINS, allow_headers=["*"], allow_methods=["*"])


async def authorise(
    request: Request,
    sent: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> None:
    """Lets in who sends one of the keys, if there are any."""
    keys, given = request.app.state.settings.keys, sent.credentials.encode() if sent else b""
    # Each is compared, in constant time: how long a refusal takes tells nothing about a key.
    if keys and not any([hmac.compare_digest(given, key) for key in keys]):
        raise HTTPException(
            401,
            "send one of the server's keys as Authorization: Bearer …",
            {"WWW-Authenticate": "Bearer"},
        )


GUARD = [Depends(authorise)]


@app.exception_handler(AnyHTTPException)
@app.exception_handler(chatglm.EngineError)
async def refuse(request: Request, error: Exception) -> Response:
    """Every refusal, in the form of the protocol that was spoken."""
    if isinstance(error, chatglm.EngineError):
        full = isinstance(error, chatglm.QueueFull)
        error = HTTPException(
            429 if full else 503, str(error), {"Retry-After": str(RETRY_AFTER)} if full else None
        )
    if error.status_code == 204:
        return Response(status_code=204)
    openai = request.url.path.startswith("/v1/")
    content = error_object(error.status_code, error.detail) if openai else {"detail": error.detail}
    return JSONResponse(content, error.status_code, error.headers)


async def admit(request: Request, kind: type[Sampling]) -> tuple:
    """A `kind` of body, and the chunks of an answer that has a place or stands in line for one.
    Raises HTTPException for what cannot be served, EngineError if nothing can be served now."""
    engine: chatglm.Engine = request.app.state.engine
    try:
        get = request.method == "GET"
        body = kind.from_query(request.query_params) if get else kind.read(await receive(request))
        messages = body.to_messages()
        # In a thread: to cut a megabyte into tokens would hold up everyone's stream.
        settings = body.settings()
        prefix = settings.pop("beginning", "")
        params = chatglm.SamplingParams(**settings)
        sequence = await asyncio.to_thread(engine.prepare, messages, params, prefix)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    if request.app.state.settings.log_prompts:
        logger.info("prompt: %s", messages[-1]["content"])
    return body, await engine.submit(sequence)  # a full queue refuses before a status is sent


class AnswerResponse(StreamingResponse):
    """Breaks off where the engine fails: uvicorn closes the connection of a response that was left
    without its end, so no reader takes half an answer for a whole one."""

    async def stream_response(self, send) -> None:
        try:
            await super().stream_response(send)
        except chatglm.EngineError as error:
            logger.error("%s", error)


class WholeResponse(StreamingResponse):
    """JSON, sent when all of it is there: a failure becomes a status, a hang-up is noticed."""

    media_type = "application/json"

    async def stream_response(self, send) -> None:
        body = "".join([part async for part in self.body_iterator]).encode()
        self.headers["content-length"] = str(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})


# --- POST /: frames of text ------------------------------------------------------------------

REFUSAL = {"detail": "top_p must be less than or equal to 1, not 2"}
CHAT = Chat.described(
    REFUSAL,
    {
        "text/plain": "<^>Hel<^>Hello!",
        "application/json": {
            "response": "Hello!",
            "history": [["Hi", "Hello!"]],
            "status": 200,
            "time": "…",
        },
    },
)
NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx


def escape(text: str) -> str:
    """Keeps the text's own markers apart: one zero-width space more in each `<^>`."""
    return re.sub("<\\^(\u200b*)>", "<^\\1\u200b>", text)


async def process(chunks: AsyncIterator[chatglm.Chunk]) -> AsyncIterator[str]:
    """Frames of an answer: the marker, then the whole text so far."""
    sent = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.text != sent and (chunk.text or chunk.finish_reason):
                sent = chunk.text
                yield "<^>" + escape(sent)
                # Gives way to the event loop. Waiting for the next token does that too, but where
                # the next frame is already there nothing would: the loop could not tell us that
                # the reader has hung up, and the answer would go on to its end for nobody.
                await asyncio.sleep(0)


async def whole(chunks: AsyncIterator[chatglm.Chunk], body: Chat) -> AsyncIterator[str]:
    """The answer in one piece, as the official api.py of ChatGLM-6B gives it."""
    async with aclosing(chunks):
        async for chunk in chunks:
            pass
    yield json.dumps(
        {
            "response": chunk.text,
            "status": 200,
            "history": extend_history(body.history, body.prompt, chunk.text),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
        ensure_ascii=False,
    )


@app.post("/", response_class=PlainTextResponse, dependencies=GUARD, **CHAT["post"])
async def chat(request: Request) -> StreamingResponse:
    """An answer in frames, `<^>` and the whole text so far; whole with `"stream": false`."""
    body, chunks = await admit(request, Chat)
    if not body.stream:
        return WholeResponse(whole(chunks, body))
    return AnswerResponse(process(chunks), headers=NO_BUFFER, media_type="text/plain")


# --- /stream: server-sent events, for browsers -----------------------------------------------


async def admit_events(request: Request) -> tuple:
    """Refuses before the first byte: a dependency still can, what yields events cannot."""
    if "last-event-id" in request.headers and request.method == "GET":
        raise HTTPException(204)  # an EventSource asks again after the end; this stops it
    return await admit(request, Chat)


EVENTS = Chat.described(REFUSAL, {"text/event-stream": 'data: {"text": "Hel"}'})


@app.get("/stream", response_class=EventSourceResponse, dependencies=GUARD, **EVENTS["get"])
@app.post("/stream", response_class=EventSourceResponse, dependencies=GUARD, **EVENTS["post"])
async def stream(
    admitted: Annotated[tuple, Depends(admit_events)],
) -> AsyncIterator[ServerSentEvent]:
    """What is new of an answer, event by event; [DONE] at its end."""
    (body, chunks), message_id, sent = admitted, uuid.uuid4().hex, ""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                new = chunk.text[len(sent) :]
                if new if body.stream else chunk.finish_reason in ("stop", "length"):
                    yield ServerSentEvent(
                        data={"text": new, "message_id": message_id}, id=message_id
                    )
                    sent = chunk.text
        yield ServerSentEvent(raw_data="[DONE]", id=message_id)
    except chatglm.EngineError as error:
        yield ServerSentEvent(event="error", data={"detail": str(error)}, id=message_id)


# --- /v1: OpenAI's chat completions ----------------------------------------------------------

OPENAI = Completion.described(
    error_object(400, "n 2 is not supported; leave it out"),
    {"application/json": {"object": "chat.completion"}, "text/event-stream": "data: [DONE]"},
)


@app.post("/v1/chat/completions", dependencies=GUARD, **OPENAI["post"])
async def complete(request: Request) -> StreamingResponse:
    """An answer in OpenAI's format, with tools, streamed or whole."""
    body, chunks = await admit(request, Completion)
    reply = Reply(model_name(), body, chunks)
    if body.stream:
        events = (format_sse_event(data_str=data) async for data in reply.stream())
        return EventSourceResponse(events, headers=NO_BUFFER)
    return WholeResponse(reply.whole())


@app.get("/v1/models", dependencies=GUARD)
async def models() -> dict:
    """The one model that is served."""
    model = {"id": model_name(), "object": "model", "created": 0, "owned_by": "chatglm"}
    return {"object": "list", "data": [model]}


# --- The other routes ------------------------------------------------------------------------


def model_name() -> str:
    return app.state.settings.model or "chatglm3-tiny"


@app.get("/health", responses={503: {"description": "not able to answer"}})
async def health(request: Request) -> JSONResponse:
    """Whether it can answer; how many answers are under way, and how many wait for a place."""
    engine: chatglm.Engine = request.app.state.engine
    able = engine.running
    return JSONResponse(
        status_code=200 if able else 503,
        content={
            "status": "ok" if able else "not able to answer",
            "model": model_name(),
            "device": str(engine.model.device),
            "active": engine.active,
            "waiting": engine.waiting,
        },
    )


@app.get("/", response_class=PlainTextResponse)
async def about(request: Request) -> Response:
    """A page to chat on for browsers; what this is, for others."""
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(Path(__file__).parent / "web" / "page.html")
    return PlainTextResponse(
        "A ChatGLM chat server. 一个 ChatGLM 对话服务器。\n\n"
        f'curl {request.base_url} -d \'{{"prompt": "你好"}}\'\n'
    )


# --- Start and stop --------------------------------------------------------------------------


class Server(uvicorn.Server):
    """SIGINT ends it at once; SIGTERM when the answers under way have ended, with status 0."""

    grace = 0.0

    def handle_exit(self, sig: int, frame) -> None:
        if sig == signal.SIGTERM and not self.should_exit:
            self.grace, self.should_exit = app.state.settings.grace, True
        else:
            self.grace = 0.0
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        later = asyncio.get_running_loop().call_later
        later(self.grace, app.state.engine.stop)  # breaks off what has not ended by then
        for connection in self.server_state.connections:  # also of readers that read no more
            later(self.grace + 0.5, connection.transport.abort)
        await super().shutdown(sockets)  # closes the listener, then waits for every answer


def main() -> None:
    settings = parse_settings(sys.argv[1:])
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:  # the port first: a model takes minutes to load, to be told then that the port is in use
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        listener.bind((settings.host, settings.port))
        load(settings)
    except (OSError, OverflowError) as error:
        sys.exit(f"api.py: cannot listen on {settings.host} port {settings.port}: {error}")
    except ValueError as error:
        sys.exit(f"api.py: {error}")
    listener.listen()
    url = "http://{}:{}".format(*listener.getsockname())
    flag = "" if settings.port == 8000 else f" --url {url}"
    if not settings.keys and settings.host not in ("127.0.0.1", "localhost", "::1"):
        print("Anyone who reaches this machine may use it: --api-key asks for a key")
    print(f"Listening on {url}\nTo chat, in another terminal: python client.py{flag}", flush=True)
    Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
