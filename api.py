"""A ChatGLM chat server: the textbook's, complete.

    python api.py                                  # the tiny ChatGLM that comes along
    python api.py --model /models/chatglm3-6b      # published weights: a folder or a hub id
    uvicorn api:app --timeout-graceful-shutdown 1  # the same, set by environment variables

Endpoints:
    POST /                     an answer in frames: `<^>` and the whole text so far
    GET  /                     a page to chat on; for curl, how to ask
    GET  /health               whether it can answer; /status, /metrics: how busy it is
    GET  /docs                 every route and field, to try in a browser
    GET, POST /stream          an answer as server-sent events      (server/sse.py)
    POST /v1/chat/completions, /v1/completions; GET /v1/models: OpenAI's  (server/openai_api.py)

Limits (all flags are in server/settings.py):
    --max-concurrency 64       answers under way at once
    --max-waiting 256          requests that wait for a place; the next is refused with 429
    --max-length               tokens of prompt and answer; unless given, the model's context
    --max-body 1048576         bytes of a request; a longer one is refused with 413
    --timeout 600              seconds one answer may take

A request's life: (1) its JSON is checked, or refused; (2) it waits for a place in the batch;
(3) each model step adds a token, and the text so far is sent; (4) it ends, or its client leaves.
"""

import asyncio
import gc
import re
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException

import chatglm
from chatglm.text.messages import extend_history, to_messages
from chatglm.text.tools import published_response, tool_names
from server import metrics, openai_api, sse, static
from server.answers import shown
from server.bodies import History, RepetitionPenalty, RequestBody, Seed, Stop, Temperature, TopP
from server.browsers import Browsers
from server.connections import uvicorn_config
from server.headers import Heads
from server.http_errors import FRAMES, REFUSAL, documented, error_response
from server.incoming import AUTH, admit
from server.listener import bind, url_of
from server.logs import setup_log
from server.preparation import FairPool
from server.responses import AnswerResponse, unless_disconnected
from server.settings import Settings, parse_settings
from server.shutdown import Server

router = APIRouter()  # the routes of this file; `app` is put together at its end

# --- 1. The request --------------------------------------------------------------------------


class Chat(RequestBody):
    """A question, with the turns before it."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "你好"}})
    prompt: str = Field(description="what the user says")
    history: History = []
    max_length: int = Field(2048, ge=1, description="tokens of prompt and answer; 0 is absent")
    top_p: TopP = 0.7
    temperature: Temperature = 0.95
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = None
    stop: Stop = []  # minded by server/answers.py
    stream: bool = Field(True, description="false: the answer in one piece")

    def prompts(self) -> list:
        return [to_messages(self.prompt, self.history)]

    def sampling_params(self) -> chatglm.SamplingParams:
        return chatglm.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_length=self.max_length,
        )


# --- 2. POST /: an answer in frames ------------------------------------------------------------


async def process(chunks: AsyncGenerator[chatglm.Chunk, None]) -> AsyncGenerator[str, None]:
    """Frames of an answer: the marker, then the whole text so far."""
    sent = None
    async with aclosing(chunks):  # closing it stops the generation, also if this is cancelled
        async for chunk in chunks:
            if chunk.text != sent and (chunk.text or chunk.finish_reason):
                sent = chunk.text
                yield "<^>" + escape(sent)
                # Gives everyone else a turn. An `await` of what is ready does not: other readers
                # would wait, and a client that has left would go unnoticed to the end.
                await asyncio.sleep(0)
            if chunk.finish_reason == "length":  # the last frame comes twice: it was cut
                yield "<^>" + escape(chunk.text)


@router.post(
    "/",
    dependencies=AUTH,
    responses=documented(REFUSAL, FRAMES),
    openapi_extra=Chat.openapi_body(),
)
async def chat(request: Request) -> Response:
    """An answer in frames, `<^>` and the whole text so far; whole with `"stream": false`."""
    admitted = await admit(request, Chat)  # checked, and in the queue; or it is refused here
    body, chunks = shown(admitted)
    if body.stream:
        return AnswerResponse(process(chunks))
    return JSONResponse(await unless_disconnected(request, whole(chunks, body)))


def escape(text: str) -> str:
    """Marks the text's own `<^>` by a zero-width space, one more than are there already: so a
    client can take it out again."""
    return re.sub("<\\^(\u200b*)>", "<^\\1\u200b>", text)


async def whole(chunks: AsyncGenerator[chatglm.Chunk, None], body: Chat) -> dict:
    """The answer in one piece, as the official api.py of ChatGLM-6B gives it."""
    async with aclosing(chunks):
        async for chunk in chunks:
            pass  # the last one has all the text
    names = tool_names(body.history)
    response, messages = published_response(chunk.raw, chunk.text, names)
    return {
        "response": response,
        "status": 200,
        "history": extend_history(body.history, body.prompt, messages),
        "finish_reason": chunk.finish_reason,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# --- 3. The other routes -----------------------------------------------------------------------


@router.get("/health", responses={503: {"description": "not able to answer"}})
async def health(request: Request) -> JSONResponse:
    """Whether it can answer; how many answers are under way, and how many wait for a place."""
    engine: chatglm.Engine = request.app.state.engine
    able = engine.running
    return JSONResponse(
        status_code=200 if able else 503,
        content={
            "status": "ok" if able else "not able to answer",
            "model": request.app.state.settings.model_name,
            "device": str(engine.model.device),
            "active": engine.active,
            "waiting": engine.waiting,
        },
    )


@router.get("/", response_class=PlainTextResponse)
async def page(request: Request) -> Response:
    """A page to chat on for browsers; what this is, for others."""
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(Path(__file__).parent / "web" / "page.html", headers=static.FRESH)
    return PlainTextResponse(
        "A ChatGLM chat server. 一个 ChatGLM 对话服务器。\n\n"
        f'curl {request.base_url} -d \'{{"prompt": "你好"}}\'\n'
    )


# --- 4. Start and stop -------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """The engine runs from before the first request to after the last."""
    setup_log()
    if not hasattr(app.state, "loaded"):  # under `uvicorn api:app` there was no main()
        load(parse_settings([]))
    tokenizer, model = app.state.loaded
    settings: Settings = app.state.settings
    with chatglm.Engine(
        tokenizer,
        model,
        max_concurrency=settings.max_concurrency,
        max_waiting=settings.max_waiting,
        max_length=settings.max_length,
        timeout=settings.timeout,
        separate_caches=settings.separate_caches,
    ) as engine:
        app.state.engine, app.state.preparation = engine, FairPool()
        app.state.metrics = metrics.Metrics(engine)
        gc.freeze()  # what is there now is no garbage: to look through it takes 0.5 s, also at exit
        yield  # here the server runs


def load(settings: Settings) -> None:
    """Loads the model for the app to start with. Raises ValueError for what cannot be served."""
    app.state.settings = settings
    app.state.loaded = chatglm.load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        chat_format=settings.chat_format,
        quantize=settings.quantize,
        devices=settings.devices,
        adapter=settings.adapter,
    )


# FastAPI's own /docs fetches its scripts from another server; this one serves them itself.
app = FastAPIOffline(redoc_url=None, title="A ChatGLM chat server", lifespan=lifespan)
app.include_router(router)
app.include_router(sse.make_router(Chat))
app.include_router(openai_api.router)
app.include_router(metrics.router)
app.mount("/static", static.PageFiles())
app.add_middleware(Browsers)
app.add_middleware(Heads)
app.add_exception_handler(HTTPException, error_response)
app.add_exception_handler(chatglm.EngineError, error_response)
app.add_exception_handler(Exception, error_response)


def announce(url: str, settings: Settings) -> None:
    """Says where the server listens, and how to chat with it."""
    if not settings.keys and settings.host not in ("127.0.0.1", "localhost", "::1"):
        print("Anyone who reaches this machine may use it: --api-key-file asks for a key")
    flag = "" if settings.port == 8000 else f" --url {url}"
    print(f"Listening on {url}\nTo chat, in another terminal: python client.py{flag}", flush=True)


def main() -> None:
    settings = parse_settings(sys.argv[1:])
    # Bind first: nobody should wait minutes for a model only to learn that the port is taken.
    listener = bind(settings.host, settings.port)
    try:
        load(settings)
    except (OSError, ValueError) as error:
        sys.exit(f"api.py: {error}")
    listener.listen()
    announce(url_of(listener), settings)
    Server(uvicorn_config(app, settings), lambda: app.state.engine.stop(), settings.grace).run(
        sockets=[listener]
    )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
