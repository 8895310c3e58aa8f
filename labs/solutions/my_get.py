import sys

import requests
from fastapi import FastAPI

app = FastAPI()


@app.get("/repeat/{number}")
async def repeat(number: int, text: str = "ha"):
    return {"number": number, "result": text * number}


if __name__ == "__main__":
    url, number, text = sys.argv[1:]
    response = requests.get(f"{url}/repeat/{number}", params={"text": text})
    print(response.json()["result"])
