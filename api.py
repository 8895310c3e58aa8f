"""A ChatGLM chat server in one file.

    python api.py                                  # the tiny ChatGLM that comes along
    python api.py --model /models/chatglm3-6b      # published weights: a folder or a hub id
    uvicorn api:app --timeout-graceful-shutdown 1  # the same, set by environment variables

`POST /` takes a prompt and streams the answer; `GET /health` says whether it can, and how busy it
is; `GET /docs` shows both. A request's life: (1) its JSON is checked, or refused with a reason;
(2) it waits for a place in the batch; (3) each step of the model takes it a token further, and
`process` sends the text so far; (4) it ends, or its reader hangs up, and its place is free.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import chatglm
from chatglm.chat import extend_history, shown, to_messages

# --- Settings: flags, each also an environment variable: --log-prompts is CHATGLM_LOG_PROMPTS ----

FLAGS = {
    "model": (str, None, "a folder or a hub id (default: the tiny ChatGLM that comes along)"),
    "device": (str, "auto", "auto, cuda, cuda:1, mps or cpu"),
    "dtype": (str, "auto", "auto, bfloat16, float16 or float32"),
    "chat-format": (str, None, "chatglm2 or chatglm3, where the checkpoint does not say"),
    "host": (str, "127.0.0.1", "0.0.0.0 lets other machines in"),
    "port": (int, 8000, "the port to listen on"),
}
MAX_BODY = 2**20  # bytes of a request: far more than any context holds
logger = logging.getLogger("chatglm")


def parse_settings(arguments: list[str]) -> argparse.Namespace:
    """What the flags say, else the environment, else the defaults."""
    parser = argparse.ArgumentParser(prog="api.py", description=app.title, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"api.py: {message} (--help lists the flags)\n")
    for name, (kind, default, text) in FLAGS.items():
        variable = "CHATGLM_" + name.upper().replace("-", "_")
        parser.add_argument(f"--{name}", type=kind, default=os.environ.get(variable) or default,
                            help=f"{text} [{variable}]")
    parser.add_argument("--log-prompts", action="store_true", help="log what users ask",
                        default=os.environ.get("CHATGLM_LOG_PROMPTS", "") not in ("", "0"))
    return parser.parse_args(arguments)


# --- The request -----------------------------------------------------------------------------

class Chat(BaseModel):
    """The body of `POST /`. Types are strict, null counts as absent, other keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False,
                              json_schema_extra={"example": {"prompt": "你好"}})
    prompt: str = Field(description="what the user says")
    history: list = Field([], description='[query, response] pairs, or {"role", "content"} dicts')
    max_length: int = Field(2048, ge=1, description="tokens of prompt and answer; 0 is absent")
    top_p: float = Field(0.7, gt=0, le=1, description="nucleus sampling; 0 is absent")
    temperature: float = Field(0.95, ge=0, le=2, description="0 is greedy")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="over 1 discourages repetition")
    seed: int | None = Field(None, ge=0, lt=2**32, description="makes an answer repeatable")
    stream: bool = Field(True, description="false: one JSON object instead of a stream")

    @model_validator(mode="before")
    @classmethod
    def leave_out_absent(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        zero = {"max_length", "top_p"}  # 0 there is absent, as in the textbook's `top_p or 0.7`
        return {key: value for key, value in body.items() if value is not None
                and not (key in zero and type(value) in (int, float) and value == 0)}

    @classmethod
    def read(cls, body: bytes) -> "Chat":
        """Reads it, whatever the Content-Type says. Raises ValueError, naming the field."""
        try:
            return cls.model_validate(json.loads(body.decode("utf-8-sig")))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the body"
            wanted = re.sub("^Input should", "must", first["msg"]).replace("Field", "is")
            raise ValueError(f"{field} {wanted}, not {shown(first['input'])}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
            raise ValueError(f'the body must be JSON like {{"prompt": "hi"}}: {error}') from error


async def receive(request: Request) -> bytes:
    """The whole body. One that is too long is read to its end before it is refused: a sender whose
    connection breaks while it still sends never learns why."""
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        body += part if size <= MAX_BODY else b""
    if size > MAX_BODY:
        raise HTTPException(413, f"the body has {size} bytes, over {MAX_BODY}; send less history")
    return bytes(body)


# --- The app ---------------------------------------------------------------------------------

@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The model runs from before the first request to after the last."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    if not hasattr(app.state, "loaded"):  # under `uvicorn api:app` there was no main()
        load(parse_settings([]))
    with chatglm.Engine(*app.state.loaded) as app.state.engine:
        yield


def load(settings: argparse.Namespace) -> None:
    app.state.settings = settings
    app.state.loaded = chatglm.load(
        settings.model, settings.device, settings.dtype, settings.chat_format)


app = FastAPI(title="A ChatGLM chat server", lifespan=lifespan)


class AnswerResponse(StreamingResponse):
    """Breaks off where the engine fails: uvicorn closes the connection of a response that was left
    without its end, so no reader takes half an answer for a whole one."""

    async def stream_response(self, send) -> None:
        try:
            await super().stream_response(send)
        except chatglm.EngineError as error:
            logger.error("%s", error)


# --- POST / ----------------------------------------------------------------------------------

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
    yield json.dumps({"response": chunk.text, "status": 200,
                      "history": extend_history(body.history, body.prompt, chunk.text),
                      "time": time.strftime("%Y-%m-%d %H:%M:%S")}, ensure_ascii=False)


@app.post("/", response_class=PlainTextResponse, openapi_extra={"requestBody": {
    "required": True, "content": {"application/json": {"schema": Chat.model_json_schema()}}}})
async def chat(request: Request) -> StreamingResponse:
    """An answer in frames, `<^>` and the whole text so far; whole with `"stream": false`."""
    engine: chatglm.Engine = request.app.state.engine
    try:
        body = Chat.read(await receive(request))
        sampling = body.model_dump(exclude={"prompt", "history", "stream"})
        # In a thread: to cut a megabyte into tokens would hold up everyone's stream.
        prepared = await asyncio.to_thread(
            lambda: engine.prepare(to_messages(body.prompt, body.history), **sampling))
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    if request.app.state.settings.log_prompts:
        logger.info("prompt: %s", body.prompt)
    if not body.stream:
        return AnswerResponse(whole(engine.stream(prepared), body), media_type="application/json")
    return AnswerResponse(process(engine.stream(prepared)), media_type="text/plain; charset=utf-8",
                          headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


# --- The other routes ------------------------------------------------------------------------

@app.get("/health", responses={503: {"description": "not able to answer"}})
async def health(request: Request) -> JSONResponse:
    """Whether it can answer; how many answers are under way, and how many wait for a place."""
    state = request.app.state
    able = state.engine.running
    return JSONResponse(status_code=200 if able else 503, content={
        "status": "ok" if able else "not able to answer", "model": state.settings.model or "tiny",
        "device": str(state.engine.model.device), "active": state.engine.active,
        "waiting": state.engine.waiting})


@app.get("/", response_class=PlainTextResponse)
async def about(request: Request) -> str:
    """What this is, for a person who opens the address in a browser."""
    return (f"A ChatGLM chat server. 这里是一个 ChatGLM 对话服务器。\n\n"
            f"curl {request.base_url} -d '{{\"prompt\": \"你好\"}}'\n")


# --- Start and stop --------------------------------------------------------------------------

class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(app.state.engine.stop)  # so that answers under way break off
        for connection in list(self.server_state.connections):  # also of who reads no more
            asyncio.get_running_loop().call_later(0.5, connection.transport.abort)
        await super().shutdown(sockets)


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
    address = "http://{}:{}".format(*listener.getsockname())
    flag = "" if settings.port == 8000 else f" --url {address}"
    print(f"Listening on {address}\nTo chat, in another terminal: python client.py{flag}")
    sys.stdout.flush()  # a log file would not get it otherwise
    Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
