"""The server on many machines, with Ray Serve: the app of api.py, in as many replicas as needed.

    serve run deploy.app:deploy                                     # on a laptop: one replica
    serve run deploy.app:deploy model=/models/chatglm3-6b max-replicas=4

Arguments are the flags of api.py and of SCALING, without dashes in front. Ray starts the replicas,
spreads requests over them, adds some while many answers are under way, and replaces one that died.
Each is a whole server with a model, a batch and a cache of its own, on one GPU where there are any.
Requests with the same `x-session-id` go to the same replica: it has their history in its cache.
"""

import os
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

import api
from server.http_errors import RETRY_AFTER
from server.settings import Settings, parse_settings

SCALING = {  # what Ray is told of replicas, in its own words; times in seconds
    "min-replicas": 1,
    "max-replicas": 8,
    "target-ongoing-requests": 32,
    "look-back-period-s": 30,
    "upscale-delay-s": 30,
    "downscale-delay-s": 600,
}
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
CODE = {"working_dir": str(Path(api.__file__).parent)}  # every machine of the cluster gets it


class Replica:
    """What Ray asks of a replica, besides serving its app."""

    def __init__(self, settings: Settings) -> None:
        api.load(settings)

    def check_health(self) -> None:
        """Raises RuntimeError where the engine cannot answer: Ray then starts another replica."""
        if not api.app.state.engine.running:
            raise RuntimeError("the engine is not able to answer")


def deploy(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` calls. Ends the process with a line for a flag that there is not."""
    scaling = {
        name.replace("-", "_"): float(arguments.pop(name, default))
        for name, default in SCALING.items()
    }
    cpus = float(arguments.pop("cpus-per-replica", 1))  # torch gets as many threads from Ray
    settings = parse_settings([f"--{name}={value}" for name, value in arguments.items()])
    for name in ("model", "adapter"):  # a replica runs in another folder
        folder = getattr(settings, name)
        if folder and os.path.isdir(folder):
            setattr(settings, name, os.path.abspath(folder))
    if not ray.is_initialized():
        ray.init(runtime_env=CODE)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    gpu = settings.device.startswith("cuda") or (
        settings.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    # Ray lets more through than a replica takes: a full one refuses in each protocol's own words.
    most = 2 * (settings.max_concurrency + settings.max_waiting)
    return serve.deployment(
        serve.ingress(lambda: api.app)(Replica),
        name="chatglm",
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(gpu)},
        autoscaling_config=AutoscalingConfig(**scaling),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER),
        graceful_shutdown_timeout_s=settings.timeout,
        health_check_period_s=5,
    ).bind(settings)
