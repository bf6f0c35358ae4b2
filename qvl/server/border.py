"""The outermost layer: every request gets an id, is counted, and ends in an HTTP answer whatever happens inside.

Knows ids, counting and the last resort. Does not know routes.
"""

from __future__ import annotations

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl.server.failures import ClientGone, error_response, internal_error, logger
from qvl.server.metrics import Metrics

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
CLIENT_CLOSED_REQUEST = 499


def request_id_of(scope: Scope) -> str:
    """The id this request goes by: the caller's `X-Request-Id` when it is short and plain, else a random one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SAFE_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


class BorderMiddleware:
    """Gives ids, counts requests by route and status, answers HEAD as GET, and 500 to what nobody foresaw."""

    def __init__(self, app: ASGIApp, metrics: Metrics, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET"}
        scope["request_id"] = request_id
        if self._root_path:
            # Routes then match with the prefix (the proxy in front left it on) and without it (stripped off).
            scope["root_path"] = self._root_path
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = CLIENT_CLOSED_REQUEST
            await _abort_connection(scope, receive)
        except Exception as error:  # noqa: BLE001  the border of the process: one bad request must not be felt by others
            logger.error("request %s failed unexpectedly", request_id, exc_info=error)
            if status == 0:
                await error_response(internal_error(request_id))(scope, receive, send_with_id)
        finally:
            self._metrics.count_request(scope, status)


async def _abort_connection(scope: Scope, receive: Receive) -> None:
    """Drop the connection with whatever it still had to send: its client has gone, or reads or sends nothing."""
    extension = (scope.get("extensions") or {}).get("qvl.abort")
    if extension is not None:
        extension["call"]()
        # Until the server has noticed it too: it would take the missing end of the answer for a fault of ours.
        await receive()
