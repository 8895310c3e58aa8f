"""实验 0：问服务器一个问题。Lab 0: ask the server one question.

python my_ask.py http://127.0.0.1:8000 "什么是 HTTP？"
"""

import sys

import requests

url, question = sys.argv[1:]
# TODO: 把问题放进请求体 / put the question into the body of the request
response = requests.post(url)
print(response.text)
