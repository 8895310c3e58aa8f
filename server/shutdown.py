"""Ctrl-C ends the server at once; SIGTERM when the answers under way have ended, with status 0.

Under `uvicorn api:app` this is uvicorn's own affair, see --timeout-graceful-shutdown.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

PARTING = 0.5  # seconds between stopping the engine and closing connections: errors are sent then


class Server(uvicorn.Server):
    """uvicorn waits for answers without a limit; this breaks them off after `grace` seconds."""

    def __init__(
        self, config: uvicorn.Config, stop_engine: Callable[[], None], grace: float
    ) -> None:
        super().__init__(config)
        self.stop_engine, self.grace = stop_engine, grace
        self.remaining = 0.0  # seconds that answers have left once the shutdown begins

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and not self.should_exit:
            # Not passed on to uvicorn, which would raise the signal again after the shutdown: the
            # exit status would not be 0.
            self.remaining, self.should_exit = self.grace, True
        else:
            self.remaining = 0.0
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        call_later = asyncio.get_running_loop().call_later
        call_later(self.remaining, self.stop_engine)
        for connection in self.server_state.connections:  # also those of clients that never read
            call_later(self.remaining + PARTING, connection.transport.abort)
        await super().shutdown(sockets)  # closes the listener, then waits for every answer
