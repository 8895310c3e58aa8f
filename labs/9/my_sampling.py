"""实验 9：加一个采样参数。Lab 9: add a sampling parameter.

python -m uvicorn --app-dir labs/9 my_sampling:app
python labs/9/my_sampling.py http://127.0.0.1:8000 "什么是 HTTP？" --top-k 5
"""

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
    # TODO: top_k


def choose(logits, temperature, generator):  # logits: [V]
    """下一个 token。The next token."""
    if temperature == 0:
        return int(logits.argmax())
    # TODO: 只留下最可能的 top_k 个 / keep the top_k likeliest alone
    probabilities = (logits / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(prompt, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    new = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    cache, answer = None, []
    while len(answer) < 100:
        output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = choose(output.logits[0, -1].float(), temperature, generator)
        if token in tokenizer.stop_ids:
            break
        answer.append(token)
        new = [token]
    return tokenizer.visible(tokenizer.decode(answer), finished=True)


@app.post("/")
def chat(body: Chat):
    return {"response": generate(body.prompt, body.temperature, body.seed)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("prompt")
    # TODO: --top-k
    args, _ = parser.parse_known_args()
    response = requests.post(args.url, json={"prompt": args.prompt})
    print(response.json()["response"])
