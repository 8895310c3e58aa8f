import codecs
import re
import sys

import requests

sys.stdout.reconfigure(encoding="utf-8")
url, question = sys.argv[1:]
decoder = codecs.getincrementaldecoder("utf-8")()  # keeps half a character for later
received, shown = "", ""
try:
    with requests.post(url, json={"prompt": question}, stream=True) as response:
        if not response.ok:
            sys.exit(f"拒绝 (refused): {response.json()['detail']}")
        for chunk in response.iter_content(chunk_size=None):
            received += decoder.decode(chunk)
            # An end that looks like the beginning of a marker waits for the next chunk.
            text = re.sub(r"<\^?$", "", received.rpartition("<^>")[2])
            if text.startswith(shown):
                print(text.removeprefix(shown), end="", flush=True)
                shown = text
except requests.exceptions.RequestException as error:
    print()
    sys.exit(f"回答不完整 (incomplete): {error}")
print(received.rpartition("<^>")[2].removeprefix(shown))
