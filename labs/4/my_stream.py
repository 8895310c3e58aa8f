"""实验 4：教材里的流式服务器，只换了模型。Lab 4: the chapter's, as printed but for the model.

python -m uvicorn --app-dir labs/4 my_stream:app
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
            prompt,
            history,
            max_length=max_length,
            top_p=top_p,
            temperature=temperature,
        ):
            yield "<^>" + response
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        pass


@app.post("/")
async def create_item(request: Request):
    data = await request.json()
    prompt = data.get("prompt")
    history = data.get("history")
    max_length = data.get("max_length") or 2048
    top_p = data.get("top_p") or 0.7
    temperature = data.get("temperature", 0.95)
    return StreamingResponse(process(), media_type="text/plain")
