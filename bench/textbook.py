"""The server as courses print it: one synchronous generator inside an async handler.

    python -m bench.textbook FOLDER PORT

Nothing here is better or worse than in the courses: `stream_chat` does at each step what the
published modeling_chatglm.py does (the whole vocabulary sorted, the whole answer decoded anew).
But the network and its weights are chatglm.load's, because a course's own trust_remote_code no
longer runs on today's transformers, and the benchmark needs GET /health to see how long the event
loop is held up.
"""

import asyncio
import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

import chatglm
from chatglm.text.messages import to_messages

app = FastAPI()


@torch.inference_mode()
def stream_chat(model, tokenizer, prompt, history, max_length, top_p, temperature):
    input_ids = torch.tensor([tokenizer.encode_chat(to_messages(prompt, history))])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    start, new, cache = input_ids.shape[1], input_ids, None
    while input_ids.shape[1] < max_length:
        output = model(new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores = warpers(input_ids, output.logits[:, -1].float())
        new = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        if new.item() in tokenizer.stop_ids:
            break
        input_ids = torch.cat([input_ids, new], dim=-1)
        yield tokenizer.decode(input_ids[0, start:].tolist())


async def process(prompt, history, max_length, top_p, temperature):
    for response in stream_chat(
        app.state.model, app.state.tokenizer, prompt, history, max_length, top_p, temperature
    ):
        yield "<^>" + response
        await asyncio.sleep(0)


@app.post("/")
async def chat(request: Request):
    data = await request.json()
    return StreamingResponse(
        process(
            data.get("prompt"),
            data.get("history") or [],
            data.get("max_length") or 2048,
            data.get("top_p") or 0.7,
            data.get("temperature") or 0.95,
        ),
        media_type="text/plain",
    )


@app.get("/health")
async def health():
    return {"status": "ok"}


if __name__ == "__main__":
    app.state.tokenizer, app.state.model = chatglm.load(sys.argv[1])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
