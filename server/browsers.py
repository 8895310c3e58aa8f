"""Web pages that reach this server through the browser of somebody who may use it.

A page of any origin can make a browser send a question here, and every page reaches the browser's
own machine. Browsers say from where a request comes, in `Origin` and `Sec-Fetch-Site`, and a page
can change neither. Scripts and command lines send neither.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from chatglm.errors import preview
from server.http_errors import refusal_response
from server.settings import Settings


async def refuse_other_sites(request: Request) -> None:
    """Refuses what a page of another origin asks for, unless --cors-origin allows it."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):  # this server's page, or what a person typed
        return
    if origin is None and site is None:  # no browser, or one that asks over plain HTTP
        return
    host = request.headers.get("host")
    if origin is not None and origin.partition("://")[2] == host:
        return
    origins = request.app.state.settings.origins
    if "*" not in origins and origin not in origins:
        value = preview(origin) if origin else "ITS-ORIGIN"
        raise HTTPException(
            403,
            "a web page of another origin asked this, or a program that is made of one; start the "
            f"server with --cors-origin {value} to let it",
        )


class Browsers:
    """Refuses names that are not this machine's, and tells browsers which origins may read.

    Starlette's own middlewares must know the settings when they are built; under `uvicorn api:app`
    that is before there are any.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        settings: Settings = scope["app"].state.settings
        app: ASGIApp = CORSMiddleware(
            self.app,
            settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Unknown-Fields"],
            allow_private_network=True,
        )
        if not is_served(scope, settings.hosts):
            app = refusal_response(HTTPException(403, WRONG_HOST), scope["path"])
        await app(scope, receive, send)


WRONG_HOST = "this name is not served: use localhost, or start the server with --allowed-host NAME"


def is_served(scope: Scope, hosts: list[str]) -> bool:
    """Whether the Host header has one of the names in `hosts`, or this machine's own.

    A page can have its own name resolve to 127.0.0.1 (DNS rebinding): for the browser, this server
    is then of the page's origin. Only the name in the Host header shows that.
    """
    server = scope.get("server")
    if not hosts and not (server and is_loopback(server[0])):
        return True  # it came from the network, where the machine's names are not known here
    names = [name_in(value) for header, value in scope["headers"] if header == b"host"]
    return "*" in hosts or all(name in hosts or is_loopback(name) for name in names)


def name_in(host: bytes) -> str:
    """Of a Host header, without the port. An empty one says nothing, as a missing one."""
    try:
        return (urlsplit(f"//{host.decode('latin-1')}").hostname or "") if host else "localhost"
    except ValueError:  # half of an IPv6 address
        return ""


def is_loopback(name: str) -> bool:
    """localhost, and the addresses by which a machine reaches itself."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    # Where IPv6 is listened on, a connection of IPv4 comes from such an address.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
