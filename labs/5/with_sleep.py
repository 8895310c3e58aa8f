"""实验 5：上一个程序加一行。Lab 5: the program before, and one line more.

python -m uvicorn --app-dir labs/5 with_sleep:app
"""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import chatglm

app = FastAPI()
tokenizer, model = chatglm.load()


async def process(prompt, history, temperature):
    for response, _ in model.stream_chat(tokenizer, prompt, history, temperature=temperature):
        yield "<^>" + response
        await asyncio.sleep(0)


@app.post("/")
async def chat(request: Request):
    data = await request.json()
    frames = process(data["prompt"], data.get("history") or [], data.get("temperature", 0.95))
    return StreamingResponse(frames, media_type="text/plain")


@app.get("/health")
async def health():
    return {"status": "ok"}
