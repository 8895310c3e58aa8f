import argparse

import requests
import torch
from fastapi import FastAPI
from pydantic import BaseModel, Field

import chatglm

app = FastAPI()
tokenizer, model = chatglm.load()


class Chat(BaseModel):
    prompt: str
    temperature: float = Field(0.95, ge=0, le=2)
    seed: int = 0
    top_k: int | None = Field(None, ge=1)


def choose(logits, temperature, top_k, generator):  # logits: [V]
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(prompt, temperature, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    new = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    cache, answer = None, []
    while len(answer) < 100:
        output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = choose(output.logits[0, -1].float(), temperature, top_k, generator)
        if token in tokenizer.stop_ids:
            break
        answer.append(token)
        new = [token]
    return tokenizer.visible(tokenizer.decode(answer), finished=True)


@app.post("/")
def chat(body: Chat):
    return {"response": generate(body.prompt, body.temperature, body.top_k, body.seed)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("prompt")
    parser.add_argument("--top-k", type=int)
    args = parser.parse_args()
    body = {"prompt": args.prompt}
    if args.top_k is not None:
        body["top_k"] = args.top_k
    response = requests.post(args.url, json=body)
    print(response.json()["response"])
