"""GET /metrics and GET /status: what is counted is what happened.

pytest tests/test_metrics.py
"""

import re
from contextlib import closing

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from test_api import ENDLESS, ask
from tests.plugin import API
from tests.servers import LIMIT, busy, shared, until

V1 = "/v1/chat/completions"
SECRET = "什么是 HTTP？"


@pytest.fixture
def own():
    """A server of which nothing was asked."""
    with shared(*API) as server:
        yield server


def values(url):
    reply = requests.get(url + "/metrics", timeout=LIMIT)
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_what_is_counted_is_what_happened(own):
    url, asked = own.url, {"messages": [{"role": "user", "content": SECRET}], "temperature": 0}
    usage = requests.post(url + V1, json={**asked, "max_tokens": 9}, timeout=LIMIT).json()["usage"]
    answer = ask(url, SECRET, temperature=0)
    stopped = {**asked, "stop": answer[:3], "max_tokens": 40}
    assert requests.post(url + V1, json=stopped, timeout=LIMIT).status_code == 200
    assert requests.post(url, json={"prompt": 5}, timeout=LIMIT).status_code == 400
    with closing(requests.post(url, json=ENDLESS, stream=True, timeout=LIMIT)):
        with own.held():
            until(lambda: busy(url) == 1)
            under_way = values(url)
            page = requests.get(url + "/status", timeout=LIMIT).text
    until(lambda: busy(url) == 0)
    told = values(url)
    assert under_way["chatglm_num_requests_running",] == 1
    assert under_way["chatglm_num_requests_waiting",] == 0
    assert 0 < under_way["chatglm_kv_cache_usage_ratio",] < 1
    assert told["chatglm_num_requests_running",] == told["chatglm_kv_cache_usage_ratio",] == 0
    assert told["chatglm_requests_total", "length"] == 1
    assert told["chatglm_requests_total", "finished"] == 2  # one by a stop sequence
    assert told["chatglm_requests_total", "cancelled"] == 1
    assert told["chatglm_refusals_total", "400"] == 1
    assert told["chatglm_prompt_tokens_total",] >= 2 * usage["prompt_tokens"]
    assert told["chatglm_generation_tokens_total",] >= usage["completion_tokens"] + 9
    assert 3 <= told["chatglm_time_to_first_token_seconds_count",] <= 4
    assert told["chatglm_time_per_output_token_seconds_sum",] > 0
    assert "1 / 64" in page and 'http-equiv="refresh"' in page
    assert SECRET not in page and answer not in page


def test_a_page_of_a_server_without_requests_has_no_numbers_to_show(own):
    page = requests.get(own.url + "/status", timeout=LIMIT)
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    cells = re.findall(r"<td>([^<]*)</td></tr>", page.text)
    assert cells == ["0 / 64", "0", "0", "0%", "–", "–", "–", "–"]
