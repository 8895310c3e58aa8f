"""实验 3：POST，用 pydantic 描述请求体。Lab 3: POST, with a body that pydantic describes.

python -m uvicorn --app-dir labs/3 my_post:app
"""

from fastapi import FastAPI, Request

app = FastAPI()
history = []


# TODO: 用一个 BaseModel 代替 Request；历史应该来自请求
# use a BaseModel instead of Request; the history should come from the request
@app.post("/")
async def chat(request: Request):
    body = await request.json()
    response = "你说：" + body["prompt"]
    history.append([body["prompt"], response])
    return {"response": response, "history": history}
