"""The port that the server listens on, and its URL."""

from __future__ import annotations

import os
import socket
import sys


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, which does not listen yet. Ends the process if it is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        sys.exit(f"api.py: cannot listen on {host} port {port}: {error}")
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
