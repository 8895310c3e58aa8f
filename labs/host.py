"""Runs a student's server so that a check can look inside and hold the model between two steps.

    python -m labs.host    # one JSON command a line on stdin, one JSON answer a line on stdout

Whether /health is answered while the model computes must not depend on how fast the machine is. So
the model waits before each step until the check lets it go on, and the check compares orders.
"""

import asyncio
import importlib.util
import json
import logging
import os
import sys
import threading
from pathlib import Path

import uvicorn


class Model:
    """The steps of every model in this process. Each begins with the embedding of its tokens."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holding, self._allowed = False, 0
        self.steps, self.waiting = 0, 0

    def watch(self) -> None:
        import torch

        def before(module: torch.nn.Module, *_: object) -> None:
            if isinstance(module, torch.nn.Embedding):
                self.step()

        torch.nn.modules.module.register_module_forward_pre_hook(before)

    def step(self) -> None:
        with self._changed:
            self.waiting += 1
            self._changed.wait_for(lambda: not self._holding or self._allowed > 0)
            self.waiting -= 1
            self._allowed = max(0, self._allowed - 1)
            self.steps += 1

    def hold(self, holding: bool) -> None:
        with self._changed:
            self._holding, self._allowed = holding, 0
            self._changed.notify_all()

    def allow(self, steps: int) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    def at_rest(self) -> bool:
        """Whether a step waits, and none is allowed."""
        with self._changed:
            return self._holding and self.waiting > 0 and not self._allowed


class Watched:
    """An ASGI application around the student's: counts its open requests, keeps the last error,
    and lets answers begin together where a check asks for that."""

    def __init__(self, app) -> None:
        self.app, self.open, self.tasks, self.error = app, 0, set(), ""
        self.together, self.ready = 0, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def meet_and_send(message) -> None:
            if message["type"] == "http.response.start" and self.together:
                self.ready += 1
                while self.ready < self.together:
                    await asyncio.sleep(0.005)
            await send(message)

        task = asyncio.current_task()
        self.tasks.add(task)
        self.open += 1
        try:
            await self.app(scope, receive, meet_and_send)
        except BaseException as error:
            self.error = describe(error)
            raise
        finally:
            self.open -= 1
            self.tasks.discard(task)


def describe(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


class Host:
    """One student's server at a time, each with an event loop of its own."""

    def __init__(self) -> None:
        self.model, self.server = Model(), None

    def load(self, file: str, model: bool = False) -> dict:
        if model and not self.model.steps and "torch" not in sys.modules:
            self.model.watch()
        self.unload()
        path = Path(file)
        sys.path.insert(0, str(path.parent))
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            self.watched = Watched(module.app)
        except BaseException as error:
            return {"error": describe(error)}
        finally:
            sys.path.remove(str(path.parent))
        config = uvicorn.Config(self.watched, port=0, log_level="critical", lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                return {"error": "the server does not start"}
            self.thread.join(0.02)
        address = self.server.servers[0].sockets[0].getsockname()
        return {"url": f"http://127.0.0.1:{address[1]}"}

    def _serve(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.server.serve())

    def unload(self) -> dict:
        self.model.hold(False)
        if self.server:
            self.server.should_exit = self.server.force_exit = True
            self.thread.join(10)
            self.server = None
        return {}

    def hold(self, holding: bool) -> dict:
        self.model.hold(holding)
        return {}

    def allow(self, steps: int) -> dict:
        self.model.allow(steps)
        return {}

    def meet(self, requests: int) -> dict:
        self.watched.together, self.watched.ready = requests, 0
        return {}

    def cancel(self) -> dict:
        """What a server does with answers under way when it must end."""
        for task in list(self.watched.tasks):
            self.loop.call_soon_threadsafe(task.cancel)
        return {}

    def state(self) -> dict:
        return {
            "open": self.watched.open,
            "steps": self.model.steps,
            "rests": self.model.at_rest(),
            "error": self.watched.error,
        }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the student's program prints does not mix with the answers
    logging.basicConfig(level=logging.CRITICAL)
    host = Host()
    for line in sys.stdin:
        command, options = json.loads(line)
        print(json.dumps(getattr(host, command)(**options)), file=answers, flush=True)
    os._exit(0)  # without waiting for a student's endless loop


if __name__ == "__main__":
    main()
