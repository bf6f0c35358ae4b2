"""The API key at the door: deny by default, before any routing. Knows keys and raw paths, nothing else."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from qvl.errors import Unauthorized
from qvl.server.failures import error_response

OPEN_PATHS = ("/health", "/ready")


class ApiKeyMiddleware:
    """Lets a request through when its path is exactly an open one, or when it carries one of `api_keys`.

    The path is compared as it came: whatever a router may later make of doubled slashes, encoded slashes or prefixes,
    it is not open here. Keys come as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], root_path: str = "") -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._open = {root_path + path for path in OPEN_PATHS} | set(OPEN_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized("missing or wrong API key; send it as 'Authorization: Bearer KEY'")
        await error_response(error)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = _digest(_given_key(scope))
        # All keys are compared, each in constant time: the answer's timing tells nothing about any of them.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _given_key(scope: Scope) -> bytes:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
