import sys

import requests
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

app = FastAPI()


class Chat(BaseModel):
    prompt: str


async def answer(prompt):
    for length in range(1, len(prompt) + 1):
        yield prompt[:length]


async def process(prompt):
    async for text in answer(prompt):
        data = text.encode()
        yield str(len(data)).encode() + b"\n" + data
    yield b"0\n"


@app.post("/")
async def chat(body: Chat):
    return StreamingResponse(process(body.prompt), media_type="text/plain")


def frames(chunks):
    received = b""
    for chunk in chunks:
        received += chunk
        while b"\n" in received:
            length, _, rest = received.partition(b"\n")
            if len(rest) < int(length):
                break
            yield rest[: int(length)].decode()
            received = rest[int(length) :]


def main():
    url, question = sys.argv[1:]
    sys.stdout.reconfigure(encoding="utf-8")
    text = ""
    with requests.post(url, json={"prompt": question}, stream=True) as response:
        for frame in frames(response.iter_content(chunk_size=None)):
            if not frame:
                print(text)
                return
            text = frame
    sys.exit("回答不完整 (incomplete)")


if __name__ == "__main__":
    main()
