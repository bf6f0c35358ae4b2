"""How an error becomes an HTTP response: the one place where `QvlError` meets status codes and headers.

Knows HTTP. Never tells a caller what an unexpected exception said: that goes to the log, under the request's id.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qvl.errors import InvalidRequest, ModelNotFound, Overloaded, QvlError, Unauthorized, Unavailable

logger = logging.getLogger("qvl.server")

RETRY_AFTER_UNAVAILABLE = 5


# Where people ask who come from other servers or from OpenAI's other APIs, and where the same is answered here.
_ELSEWHERE = {
    "responses": "/v1/chat/completions",
    "messages": "/v1/chat/completions",
    "api/chat": "/v1/chat/completions",
    "api/generate": "/v1/completions",
    "api/tags": "/v1/models",
    "api/chat/completions": "/v1/chat/completions",
    "api/completions": "/v1/completions",
    "api/models": "/v1/models",
}


class ClientGone(BaseException):
    """The client closed its connection (or stopped reading) before its answer was complete; nobody is left to tell.

    Control flow like `asyncio.CancelledError`, and like it no `Exception`: frameworks would answer it with a 500.
    """


class _HttpFailure(InvalidRequest):
    """What the router says (404, 405): a status without a class of its own in the error tree."""


def error_bytes(error: QvlError) -> bytes:
    """The OpenAI error body as JSON."""
    return msgspec.json.encode(error.body())


def error_response(error: QvlError) -> Response:
    """The whole response to a request that failed."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(RETRY_AFTER_UNAVAILABLE)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return Response(error_bytes(error), error.status, headers, "application/json")


def http_exception_response(error: HTTPException, path: str, routes: Iterable[str]) -> Response:
    """An unknown route or a wrong method, told like every other error. `routes` are the paths that there are."""
    phrase = HTTPStatus(error.status_code).phrase.lower()
    allowed = (error.headers or {}).get("Allow")
    if allowed is not None:
        says = f"{phrase}: this route takes {allowed}"
    else:
        says = f"{phrase}: no such route here (see /docs for what there is){_meant(path, routes)}"
    body = _HttpFailure(says).body()
    body["error"]["code"] = phrase.replace(" ", "_")
    return Response(msgspec.json.encode(body), error.status_code, error.headers, "application/json")


def _meant(path: str, routes: Iterable[str]) -> str:
    """The route that `path` ends in, whatever stands before it: a base URL often has /v1 too little or too much."""
    asked = _segments(path)
    if elsewhere := _ELSEWHERE.get("/".join(asked)):
        return f"; did you mean {elsewhere}?"
    if asked[:1] == ["api"]:
        return "; this server speaks OpenAI's API, below /v1, and not Ollama's"
    for route in routes:
        known = _segments(route)
        if known and asked[-len(known) :] == known:
            return f"; did you mean {route}?"
    return ""


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment not in ("", "v1")]


def internal_error(request_id: str) -> QvlError:
    """What may be told about an exception that nobody foresaw."""
    return QvlError(f"internal error; the server's log has the details under request id {request_id}")


def check_model(name: str | None, served: tuple[str, ...]) -> str:
    """The name that the answer carries. A missing or empty name means the one model that is served.

    Raises `ModelNotFound` for a name that is not one of `served`.
    """
    if name and name not in served:
        raise ModelNotFound(name, served)
    return name or served[0]
