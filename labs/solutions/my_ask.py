import sys

import requests

url, question = sys.argv[1:]
response = requests.post(url, json={"prompt": question, "stream": False})
print(response.json()["response"])
