from fastapi import FastAPI
from pydantic import BaseModel, Field

app = FastAPI()


class Chat(BaseModel):
    prompt: str
    history: list = []
    temperature: float = Field(0.95, ge=0, le=2)


@app.post("/")
async def chat(body: Chat):
    response = "你说：" + body.prompt
    return {"response": response, "history": [*body.history, [body.prompt, response]]}
