import asyncio
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import chatglm
from chatglm.text.messages import to_messages


@asynccontextmanager
async def lifespan(app: FastAPI):
    tokenizer, model = chatglm.load()
    with chatglm.Engine(tokenizer, model) as engine:  # the model has a thread of its own
        app.state.engine = engine
        yield


app = FastAPI(lifespan=lifespan)


async def process(chunks):
    async with aclosing(chunks):
        async for chunk in chunks:
            yield "<^>" + chunk.text
            await asyncio.sleep(0)


@app.post("/")
async def chat(request: Request):
    data = await request.json()
    messages = to_messages(data["prompt"], data.get("history"))
    temperature = data.get("temperature", 0.95)
    chunks = request.app.state.engine.generate(messages, temperature=temperature)
    return StreamingResponse(process(chunks), media_type="text/plain")


@app.get("/health")
async def health():
    return {"status": "ok"}
