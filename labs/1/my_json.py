"""实验 1：读 JSON，写 JSON。Lab 1: read JSON, write JSON.

每行读一个请求，每行写一个回答。One request a line in, one reply a line out.
"""

import sys

sys.stdin.reconfigure(encoding="utf-8")
sys.stdout.reconfigure(encoding="utf-8")

for line in sys.stdin:
    request = {"prompt": line.strip()}  # TODO: 这不是解析 JSON / this does not parse JSON
    response = "你说：" + request["prompt"]
    print({"response": response})  # TODO: 这不是 JSON / this is not JSON
