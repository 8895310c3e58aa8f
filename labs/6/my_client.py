"""实验 6：自己的客户端。Lab 6: a client of your own.

python my_client.py http://127.0.0.1:8000 "什么是 HTTP？"
"""

import sys

import requests

sys.stdout.reconfigure(encoding="utf-8")
url, question = sys.argv[1:]
shown = ""
# TODO: 网络怎么切都要对；断了、被拒绝时要说出来
# right for every cut of the network; a broken stream and a refusal must be told
with requests.post(url, json={"prompt": question}, stream=True) as response:
    for chunk in response.iter_content(chunk_size=None):
        text = chunk.decode().rpartition("<^>")[2]
        print(text.removeprefix(shown), end="", flush=True)
        shown = text
print()
