"""`/v1`: OpenAI's routes, so that clients written for OpenAI can be used.

What a request may hold is in openai_request.py, openai_chat.py and openai_text.py; what is answered
in openai_replies.py.
"""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from chatglm.errors import preview
from server.http_errors import documented, openai_error
from server.incoming import AUTH, admit
from server.openai_chat import ChatCompletionRequest
from server.openai_replies import ChatCompletionReply, CompletionReply, Reply
from server.openai_request import OpenAIRequest
from server.openai_text import CompletionRequest
from server.responses import PiecesOfJSON, unless_disconnected
from server.sse import EventStream

REFUSAL = openai_error(HTTPException(400, "temperature must be less than or equal to 2, not 3"))
router = APIRouter(prefix="/v1", dependencies=AUTH, responses=documented(REFUSAL))


def answered(reply: type[Reply]) -> dict:
    """What /docs says of an answer."""
    return documented(
        REFUSAL,
        {"application/json": {"object": reply.WHOLE}, "text/event-stream": "data: [DONE]"},
    )


@router.post(
    "/chat/completions",
    responses=answered(ChatCompletionReply),
    openapi_extra=ChatCompletionRequest.openapi_body(),
)
async def chat_completion(request: Request) -> Response:
    """How a conversation goes on, with tools, streamed or whole."""
    return await reply_to(request, ChatCompletionRequest, ChatCompletionReply)


@router.post(
    "/completions",
    responses=answered(CompletionReply),
    openapi_extra=CompletionRequest.openapi_body(),
)
async def completion(request: Request) -> Response:
    """How a text goes on, in no conversation, streamed or whole."""
    return await reply_to(request, CompletionRequest, CompletionReply)


async def reply_to(
    request: Request, body_type: type[OpenAIRequest], reply_type: type[Reply]
) -> Response:
    body, answers = await admit(request, body_type)
    name, tokenizer = request.app.state.settings.model_name, request.app.state.engine.tokenizer
    reply = reply_type(name, body, answers, tokenizer)
    if body.stream:
        return EventStream(reply.events())
    return PiecesOfJSON(await unless_disconnected(request, reply.whole()))


@router.get("/models")
async def models(request: Request) -> dict:
    """The one model that is served."""
    return {"object": "list", "data": [model_card(request)]}


@router.get("/models/{name:path}", responses={404: {"description": "there is no such model"}})
async def model(request: Request, name: str) -> dict:
    """The same model, by its name."""
    card = model_card(request)
    if name != card["id"]:
        raise HTTPException(404, f"there is no model {preview(name)} here, but {card['id']}")
    return card


def model_card(request: Request) -> dict:
    context = request.app.state.engine.max_request_tokens
    return {
        "id": request.app.state.settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "chatglm",
        "max_model_len": context,  # vLLM's name for it, which clients read
        "context_length": context,  # OpenRouter's
    }
