"""实验 5 用来比较的服务器，不要改。Lab 5: the server to compare with; leave it as it is.

python -m uvicorn --app-dir labs/5 naive:app
"""

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import chatglm

app = FastAPI()
tokenizer, model = chatglm.load()


async def process(prompt, history, temperature):
    # 模型每算一步，事件循环就停一步 / at each step of the model, the event loop stands still
    for response, _ in model.stream_chat(tokenizer, prompt, history, temperature=temperature):
        yield "<^>" + response


@app.post("/")
async def chat(request: Request):
    data = await request.json()
    frames = process(data["prompt"], data.get("history") or [], data.get("temperature", 0.95))
    return StreamingResponse(frames, media_type="text/plain")


@app.get("/health")
async def health():
    return {"status": "ok"}
