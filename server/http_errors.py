"""Refusals: whatever is wrong with a request, in the form of the protocol that was spoken.

`POST /` and `/stream` say `{"detail": …}`, `/v1` what OpenAI's clients expect. A message names the
field, the value and what would do; programs go by the status and the code.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import chatglm
from chatglm.errors import preview

RETRY_AFTER = 5  # seconds: by then, some of a full queue's answers have ended
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"  # OpenAI's code: the conversation is too long
REFUSAL = {"detail": "top_p must be less than or equal to 1, not 2"}  # for /docs
FRAMES = {  # an answer of POST /, in frames and whole; for /docs
    "text/plain": "<^>H<^>Hi!",
    "application/json": {
        "response": "Hi!",
        "status": 200,
        "history": [["Hi", "Hi!"]],
        "finish_reason": "stop",
        "time": "2026-01-31 12:00:00",
    },
}
REASONS = {
    400: "what cannot be served, and why",
    401: "no key, or a wrong one",
    403: "asked by a web page of another origin, or under a name that is not served",
    408: "the body came too slowly",
    413: "the body is too large",
    429: "too many wait: see Retry-After",
    431: "the request's line and headers are too long",
    503: "the model cannot answer",
}


def documented(
    refusal: dict, answers: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The responses of a route, for /docs: an example of a refusal in its form, and one of an
    answer for each media type."""
    content: dict[str, Any] = {"application/json": {"example": refusal}}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": why, "content": content} for status, why in REASONS.items()
    }
    if answers:
        content = {media: {"example": example} for media, example in answers.items()}
        responses[200] = {"description": "the answer", "content": content}
    return responses


class BadRequest(HTTPException):
    """A 400 that also says, to programs, which field is wrong and whether less history helps."""

    def __init__(self, error: ValueError) -> None:
        super().__init__(400, str(error))
        self.field = error.field if isinstance(error, chatglm.InvalidField) else None
        self.code = CONTEXT_LENGTH_EXCEEDED if isinstance(error, chatglm.PromptTooLong) else None


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """The handler of every exception, before the first byte of an answer."""
    refusal = to_http(error, request.url.path)
    request.app.state.metrics.refused.labels(refusal.status_code).inc()
    return refusal_response(refusal, request.url.path)


def refusal_response(refusal: HTTPException, path: str) -> JSONResponse:
    in_form = openai_error if "/v1/" in path else detail
    return JSONResponse(in_form(refusal), refusal.status_code, refusal.headers)


def to_http(error: Exception, path: str) -> HTTPException:
    if isinstance(error, HTTPException):
        if error.status_code == 404 and error.detail == "Not Found":  # Starlette's
            return HTTPException(404, f"there is no {preview(path)} here; /docs lists every route")
        return error
    if isinstance(error, chatglm.QueueFull):
        return HTTPException(429, str(error), {"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, chatglm.EngineError):
        return HTTPException(503, str(error))
    return HTTPException(500, "this is a fault of the server; its log tells more")


def detail(refusal: HTTPException) -> dict:
    """As FastAPI's own, and a code where a client can do something about it."""
    code = getattr(refusal, "code", None)
    return {"detail": refusal.detail, "code": code} if code else {"detail": refusal.detail}


def openai_error(refusal: HTTPException) -> dict:
    """Format: https://platform.openai.com/docs/guides/error-codes. The SDK picks its exception by
    the status."""
    kind = "server_error" if refusal.status_code >= 500 else "invalid_request_error"
    param, code = getattr(refusal, "field", None), getattr(refusal, "code", None)
    if refusal.status_code == 401:
        kind, code = "authentication_error", "invalid_api_key"
    if refusal.status_code == 429:
        kind, code = "rate_limit_error", "queue_full"
    if code == CONTEXT_LENGTH_EXCEEDED:
        param = "messages"  # all of the conversation; the engine knows it as prompt and history
    return {"error": {"message": refusal.detail, "type": kind, "param": param, "code": code}}
