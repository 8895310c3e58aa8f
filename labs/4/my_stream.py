"""实验 4：教材里的流式服务器，一字不改。Lab 4: the chapter's streaming server, as printed.

uvicorn my_stream:app
"""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import chatglm

app = FastAPI()
tokenizer, model = chatglm.load()


async def process():
    try:
        for response, history in model.stream_chat(
            tokenizer,
            prompt,  # noqa: F821
            history,
            max_length=max_length,  # noqa: F821
            top_p=top_p,  # noqa: F821
            temperature=temperature,  # noqa: F821
        ):
            yield "<^>" + response
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        pass


@app.post("/")
async def create_item(request: Request):
    data = await request.json()
    prompt = data.get("prompt")  # noqa: F841
    history = data.get("history")  # noqa: F841
    max_length = data.get("max_length") or 2048  # noqa: F841
    top_p = data.get("top_p") or 0.7  # noqa: F841
    temperature = data.get("temperature", 0.95)  # noqa: F841
    return StreamingResponse(process(), media_type="text/plain")
