"""实验 8：改协议，两边一起改。Lab 8: change the protocol, on both sides.

python -m uvicorn --app-dir labs/8 my_protocol:app
python labs/8/my_protocol.py http://127.0.0.1:8000 你好
"""

import codecs
import sys

import requests
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

app = FastAPI()


class Chat(BaseModel):
    prompt: str


async def answer(prompt):
    """一个模型的替身：把问题一个字一个字说回来。In place of a model: says the prompt back."""
    for length in range(1, len(prompt) + 1):
        yield prompt[:length]


async def process(prompt):
    async for text in answer(prompt):
        yield "<^>" + text  # TODO: 长度，换行，文字 / the length, a newline, the text


@app.post("/")
async def chat(body: Chat):
    return StreamingResponse(process(body.prompt), media_type="text/plain")


def main():
    url, question = sys.argv[1:]
    sys.stdout.reconfigure(encoding="utf-8")
    received = ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with requests.post(url, json={"prompt": question}, stream=True) as response:
        for chunk in response.iter_content(chunk_size=None):
            received += decoder.decode(chunk)
    print(received.rpartition("<^>")[2])  # TODO: 按长度读 / read by the length


if __name__ == "__main__":
    main()
