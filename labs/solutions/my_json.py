import json
import sys

sys.stdin.reconfigure(encoding="utf-8")
sys.stdout.reconfigure(encoding="utf-8")

for line in sys.stdin:
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        print(json.dumps({"detail": str(error)}))
        continue
    response = "你说：" + request["prompt"]
    history = (request.get("history") or []) + [[request["prompt"], response]]
    print(json.dumps({"response": response, "history": history}, ensure_ascii=False))
