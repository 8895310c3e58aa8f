"""实验 2：GET，路径参数和查询参数。Lab 2: GET, with a path and a query parameter.

python -m uvicorn --app-dir labs/2 my_get:app          # 服务器 / the server
python labs/2/my_get.py http://127.0.0.1:8000 3 hi     # 客户端 / the client
"""

import sys

import requests
from fastapi import FastAPI

app = FastAPI()


# TODO: number 应该来自路径，text 应该来自查询，默认 "ha"
# number should come from the path, and text from the query, "ha" unless given
@app.get("/repeat")
async def repeat():
    return {"number": 1, "result": "ha"}


if __name__ == "__main__":
    url, number, text = sys.argv[1:]
    response = requests.get(f"{url}/repeat/{number}")  # TODO: text
    print(response.json()["result"])
