"""Who asks: a name for a client, by which places are shared out. It is never logged."""

from __future__ import annotations

import hashlib
import ipaddress

from fastapi import Request
from fastapi.security.utils import get_authorization_scheme_param


def client_of(request: Request) -> str:
    """The API key where the server has keys, else the address, else nothing.

    uvicorn has put in the address of the client behind a trusted proxy, see --trusted-proxy.
    """
    # Only the key: "Bearer" may be written in several ways, each of which would be a client.
    _, key = get_authorization_scheme_param(request.headers.get("authorization"))
    if request.app.state.settings.keys and key:
        return hashlib.sha256(key.strip().encode()).hexdigest()
    return network_of(request.client.host) if request.client else ""


def network_of(host: str) -> str:
    """The address; of IPv6 the first 64 bits, as a household or a machine has all of the rest.

    >>> network_of("192.0.2.7"), network_of("2001:db8::1:2:3:4")
    ('192.0.2.7', '2001:db8::/64')
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a name that a proxy or a test gave
        return host
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
