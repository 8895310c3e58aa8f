"""From a request to an answer under way: who may ask, what the body says, a place in the engine."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator
from typing import Annotated, Generic, NamedTuple, TypeVar

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

import chatglm
from server.bodies import Prompt, RequestBody
from server.browsers import refuse_other_sites
from server.clients import client_of
from server.headers import notice_unknown_fields
from server.http_errors import BadRequest
from server.responses import unless_disconnected

UPLOAD_TIMEOUT = 60  # seconds for a body to arrive, so that a slow upload cannot hold a connection
logger = logging.getLogger("chatglm")
Body = TypeVar("Body", bound=RequestBody)


class Admitted(NamedTuple, Generic[Body]):
    """A request that has a place in the engine or is queued for one."""

    body: Body
    answers: list[AsyncGenerator[chatglm.Chunk, None]]  # closing one cancels it; /v1 has several


async def admit(request: Request, body_type: type[Body]) -> Admitted[Body]:
    """Reads, checks and queues a request. Raises HTTPException if it cannot be served, EngineError
    if nothing can be served now; after that, the response may start."""
    engine: chatglm.Engine = request.app.state.engine
    content = b"" if request.method == "GET" else await read_body(request)

    def prepare() -> tuple[Body, list[Prompt], list[chatglm.Sequence]]:
        if request.method == "GET":
            body = body_type.from_query(request.query_params)
        else:
            body = body_type.from_json(content)
        prompts = body.prompts()
        params, form = body.sampling_params(), body.form()
        return body, prompts, [engine.prepare(prompt, params, form) for prompt in prompts]

    client = client_of(request)
    preparing = request.app.state.preparation.run(client, prepare)
    try:
        body, prompts, sequences = await unless_disconnected(request, preparing)
    except ValueError as error:
        raise BadRequest(error) from error
    notice_unknown_fields(request, body)
    if request.app.state.settings.log_prompts:
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            logger.info("prompt: %s", text)
    answers: list[AsyncGenerator[chatglm.Chunk, None]] = []
    try:
        for sequence in sequences:
            sequence.trace_id = request.state.trace_id
            for number in range(body.num_answers):
                answers.append(await engine.submit(sequence.again(number), client))
    except BaseException:  # the queue is full, or the server stops: none of them is wanted
        for answer in answers:
            await answer.aclose()
        raise
    return Admitted(body, answers)


async def read_body(request: Request) -> bytes:
    """The whole body. One that is too long is read to its end before it is refused: a client whose
    connection breaks while it still sends never learns why."""
    limit = request.app.state.settings.max_body
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
    except ClientDisconnect as error:
        raise HTTPException(400, "the request body ended early") from error
    except TimeoutError as error:
        raise HTTPException(408, f"the body took more than {UPLOAD_TIMEOUT} s") from error
    if size > limit:
        raise HTTPException(413, f"the body has {size} bytes, over {limit}; send less history")
    return bytes(body)


async def require_api_key(
    request: Request,
    sent: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> None:
    """Lets a request pass that sends one of the server's keys, if it has any."""
    keys = request.app.state.settings.keys
    given = sent.credentials.encode() if sent else b""
    # Each is compared, in constant time: how long a refusal takes tells nothing about a key.
    known = [hmac.compare_digest(given, key) for key in keys]
    if keys and not any(known):
        raise HTTPException(
            401,
            "send one of the server's keys as Authorization: Bearer …",
            {"WWW-Authenticate": "Bearer"},
        )


AUTH = [Depends(refuse_other_sites), Depends(require_api_key)]  # in this order
