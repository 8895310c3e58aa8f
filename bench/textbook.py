"""The server as courses print it: one synchronous generator inside an async handler.

    python -m bench.textbook FOLDER PORT

Nothing here is better or worse than in the courses, but for the weights, which chatglm.load reads
(a course's own trust_remote_code no longer runs on today's transformers), and GET /health, which
the benchmark asks to see how long the event loop is held up.
"""

import asyncio
import sys

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import chatglm

app = FastAPI()


async def process(prompt, history, max_length, top_p, temperature):
    for response, history in app.state.model.stream_chat(
            app.state.tokenizer, prompt, history, max_length=max_length, top_p=top_p,
            temperature=temperature):
        yield "<^>" + response
        await asyncio.sleep(0)


@app.post("/")
async def chat(request: Request):
    data = await request.json()
    return StreamingResponse(process(
        data.get("prompt"), data.get("history") or [], data.get("max_length") or 2048,
        data.get("top_p") or 0.7, data.get("temperature") or 0.95), media_type="text/plain")


@app.get("/health")
async def health():
    return {"status": "ok"}


if __name__ == "__main__":
    app.state.tokenizer, app.state.model = chatglm.load(sys.argv[1])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
