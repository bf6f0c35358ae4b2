"""The name under which this server is called. A page in a browser may not reach a server of its reader's own machine.

DNS rebinding: a page's own name suddenly resolves to 127.0.0.1, and the browser lets the page read what the server
there answers. The name of the page then stands in the Host header. Knows names, nothing else.
"""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from qvl.errors import HostRefused
from qvl.server.failures import error_response
from qvl.server.options import ServerOptions

_LOCAL = (".localhost", ".local", ".internal")  # nobody can own a name below these in the public DNS


def needs_guard(options: ServerOptions) -> bool:
    """Whether being on this machine is all that a caller must prove: then a name from elsewhere is a trick."""
    return not options.api_keys and "*" not in options.allowed_hosts and _is_loopback(options.host)


class HostMiddleware:
    """Refuses requests to a name that somebody else may own: not an address, a bare or local name, nor `allowed`."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self._app = app
        self._allowed = {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or all(self._is_ours(name) for name in _names(scope)):
            await self._app(scope, receive, send)
            return
        await error_response(HostRefused())(scope, receive, send)

    def _is_ours(self, name: str) -> bool:
        return "." not in name or name in self._allowed or name.endswith(_LOCAL) or _is_address(name)


def _names(scope: Scope) -> list[str]:
    """The Host headers without their ports."""
    hosts = [value.decode("latin-1").strip().lower() for name, value in scope["headers"] if name == b"host"]
    names = [host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0] for host in hosts]
    return [name.removesuffix(".") for name in names]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
