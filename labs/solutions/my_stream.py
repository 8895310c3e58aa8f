import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import chatglm

app = FastAPI()
tokenizer, model = chatglm.load()


async def process(prompt, history, **settings):
    for response, _ in model.stream_chat(tokenizer, prompt, history, **settings):
        yield "<^>" + response
        await asyncio.sleep(0)


@app.post("/")
async def create_item(request: Request):
    data = await request.json()
    frames = process(
        data.get("prompt"),
        data.get("history") or [],
        max_length=data.get("max_length") or 2048,
        top_p=data.get("top_p") or 0.7,
        temperature=data.get("temperature", 0.95),
    )
    return StreamingResponse(frames, media_type="text/plain")
