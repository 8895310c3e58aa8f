"""What the server does, for those who look after it. No prompt and no answer is shown.

GET /metrics    for Prometheus: counts, times, what is under way
GET /status     a page for a teacher, which refreshes by itself
"""

from __future__ import annotations

import collections
import statistics
from html import escape
from pathlib import Path
from string import Template

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

import chatglm
from chatglm.engine.statistics import RequestStats

TO_FIRST = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # seconds
BETWEEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)  # seconds
PAGE = Template((Path(__file__).parents[1] / "web" / "status.html").read_text("utf-8"))


class Metrics:
    """Follows one engine. Names and meanings are close to vLLM's."""

    def __init__(self, engine: chatglm.Engine) -> None:
        own = self.registry = CollectorRegistry()  # without what the library says of this process
        prompts = "chatglm_prompt_tokens", "Tokens of prompts whose answers have ended"
        answers = "chatglm_generation_tokens", "Tokens of answers that have ended"
        to_first = "chatglm_time_to_first_token_seconds", "From the request to the first token"
        between = "chatglm_time_per_output_token_seconds", "Between two tokens, mean of an answer"
        self.ended = Counter(
            "chatglm_requests", "Answers, by how they ended", ["end"], registry=own
        )
        self.refused = Counter("chatglm_refusals", "By HTTP status", ["status"], registry=own)
        self.prompt_tokens = Counter(*prompts, registry=own)
        self.completion_tokens = Counter(*answers, registry=own)
        self.to_first = Histogram(*to_first, buckets=TO_FIRST, registry=own)
        self.between = Histogram(*between, buckets=BETWEEN, registry=own)
        for name, what, read in [
            ("chatglm_num_requests_running", "Answers under way", lambda: engine.active),
            ("chatglm_num_requests_waiting", "Requests in the queue", lambda: engine.waiting),
            ("chatglm_kv_cache_usage_ratio", "Reserved, from 0 to 1", lambda: engine.cache_usage),
        ]:
            Gauge(name, what, registry=own).set_function(read)
        engine.statistics.observers.append(self.record)

    def record(self, stats: RequestStats) -> None:
        self.ended.labels(stats.end).inc()
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.completion_tokens.inc(stats.completion_tokens)
        if stats.seconds_to_first_token is not None:
            self.to_first.observe(stats.seconds_to_first_token)
        if stats.seconds_per_token is not None:
            self.between.observe(stats.seconds_per_token)


router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counts and times, for Prometheus."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/status", response_class=HTMLResponse)
async def status(request: Request) -> HTMLResponse:
    """A page with what is under way, and what the last hundred requests took."""
    engine: chatglm.Engine = request.app.state.engine
    recent = list(engine.statistics.recent)
    ends = collections.Counter(stats.end for stats in recent)
    waits = [s.seconds_to_first_token for s in recent if s.seconds_to_first_token is not None]
    speeds = [1 / s.seconds_per_token for s in recent if s.seconds_per_token]
    return HTMLResponse(
        PAGE.substitute(
            model=escape(request.app.state.settings.model_name),
            active=engine.active,
            places=engine.max_concurrency,
            waiting=engine.waiting,
            cache=f"{engine.cache_usage:.0%}",
            speed=f"{engine.statistics.tokens_per_second():.0f}",
            number=len(recent),
            ends=", ".join(f"{end} {number}" for end, number in ends.most_common()) or "–",
            wait=f"{statistics.median(waits):.2f} s" if waits else "–",
            longest=f"{max(waits):.2f} s" if waits else "–",
            reader=f"{statistics.median(speeds):.0f}" if speeds else "–",
        )
    )
