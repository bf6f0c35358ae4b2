"""What each address answers. One request is one readable path: read the body, parse it, ask the backend, write it down.

Knows addresses. The shapes of bodies are `wire`'s, the layers in front are `app`'s, answers come from the backend.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import msgspec
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from qvl import __version__, wire
from qvl.backends.base import collect
from qvl.backends.merge import merge
from qvl.errors import InvalidRequest, QvlError
from qvl.server.failures import ClientGone, check_model, internal_error, logger
from qvl.server.metrics import Metrics
from qvl.server.openapi import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from qvl.server.overflow import Fitting
from qvl.server.service import Service
from qvl.server.sse import EventStream, event, while_connected
from qvl.types import Completion, Delta, Usage

T = TypeVar("T")
Writer = wire.ChatWriter | wire.CompletionWriter

# Larger bodies are parsed in a thread: even fast parsing of megabytes would be felt by others. A photograph as base64
# takes a quarter of a millisecond, less than it takes to hand it over and back.
PARSE_HERE_BYTES = 512 * 1024
# One thread: parsing holds the interpreter (14 ms for 21 MB), and the loop should wait for one body, not for several.
_parser = ThreadPoolExecutor(1, "qvl-parse")


class PlainRoute(APIRoute):
    """A route whose function takes the request and gives the response: nothing is looked for, injected or converted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return cast(Callable[[Request], Coroutine[Any, Any, Response]], self.endpoint)


def add_routes(router: APIRouter, service: Service) -> None:
    """All routes of one server. They are tried in order: what is asked most often comes first, and plain."""
    router.route_class = PlainRoute
    _add_generation(router, service)
    _add_tokens(router, service)
    router.route_class = APIRoute
    _add_monitoring(router, service)
    _add_models(router, service)


def _add_monitoring(router: APIRouter, service: Service) -> None:
    @router.get("/health", tags=["monitoring"], summary="200 as soon as HTTP is up")
    async def health() -> Response:
        return _json({"status": "ok"})

    @router.get("/ready", tags=["monitoring"], summary="200 only when a chat request would be answered, else 503")
    async def ready() -> Response:
        reason = service.not_ready()
        return _json({"status": "ready"}) if reason is None else _json({"status": "not ready", "reason": reason}, 503)

    @router.get("/version", tags=["monitoring"], summary="The version of qvl and what it runs on")
    async def version() -> Response:
        info = service.backend.info
        return _json({"version": __version__, "device": info.device, "dtype": info.dtype, "attention": info.attention})

    @router.get("/metrics", tags=["monitoring"], summary="Numbers in the Prometheus text format")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_models(router: APIRouter, service: Service) -> None:
    @router.get("/v1/models", tags=["models"], summary="The models served here")
    async def models() -> Response:
        return _json(_model_list(service, service.names))

    @router.get("/v1/models/{name:path}", tags=["models"], summary="One model")
    async def model(name: str) -> Response:
        return _json(_model_list(service, [check_model(name, service.names)])["data"][0])


def _model_list(service: Service, names: Sequence[str]) -> dict[str, Any]:
    info = service.backend.info
    return wire.model_list(names, created=service.created, max_model_len=info.max_model_len, picture=info.picture)


def _add_generation(router: APIRouter, service: Service) -> None:
    @router.post("/v1/chat/completions", tags=["answers"], summary="The answer to a conversation", openapi_extra=CHAT)
    async def chat_completions(request: Request) -> Response:
        since = time.perf_counter()
        call = await _parse(wire.parse_chat, request, service.metrics)
        head = _head("chatcmpl", call.model, service)
        fitting = Fitting(call.request)
        strategy = call.overflow or service.options.overflow
        if strategy != "error":
            fitting = await while_connected(request.receive, service.overflow.fit(call.request, strategy, head.id))
        writer = wire.ChatWriter(head, service.backend.token_bytes, call.options, fitting.told)
        deltas = service.backend.chat(fitting.request, head.id)
        return await _answer(request, service, deltas, writer, since, stream=call.stream, options=call.options)

    @router.post("/v1/completions", tags=["answers"], summary="The continuation of a text", openapi_extra=COMPLETION)
    async def completions(request: Request) -> Response:
        since = time.perf_counter()
        call = await _parse(wire.parse_completion, request, service.metrics)
        head = _head("cmpl", call.model, service)
        writer = wire.CompletionWriter(head, service.backend.token_bytes, call.options)
        streams = [service.backend.complete(one, f"{head.id}-{i}") for i, one in enumerate(call.requests)]
        deltas = merge(streams, call.requests[0].sampling.n)
        return await _answer(request, service, deltas, writer, since, stream=call.stream, options=call.options)


def _add_tokens(router: APIRouter, service: Service) -> None:
    @router.post(
        "/tokenize", tags=["tokens"], summary="The tokens of a text or of a conversation", openapi_extra=TOKENIZE
    )
    async def tokenize(request: Request) -> Response:
        call = await _parse(wire.parse_tokenize, request, service.metrics)
        check_model(call.model, service.names)
        token_ids = await while_connected(request.receive, service.backend.tokenize(call.request))
        token_bytes = service.backend.token_bytes if call.return_token_strs else None
        length = service.backend.info.max_model_len
        return _json(wire.tokenize_response(token_ids, max_model_len=length, token_bytes=token_bytes))

    @router.post("/detokenize", tags=["tokens"], summary="The text of tokens", openapi_extra=DETOKENIZE)
    async def detokenize(request: Request) -> Response:
        call = await _parse(wire.parse_detokenize, request, service.metrics)
        check_model(call.model, service.names)
        return _json(wire.detokenize_response(await service.backend.detokenize(call.token_ids)))


async def _answer(
    request: Request,
    service: Service,
    deltas: AsyncGenerator[Delta, None],
    writer: Writer,
    since: float,
    *,
    stream: bool,
    options: wire.Options,
) -> Response:
    """The backend's deltas as a stream of events or as one body."""
    measured = service.metrics.track(deltas, since)
    if stream:
        return EventStream(
            _events(measured, writer, options.include_usage),
            stall_seconds=service.options.stall_seconds,
            describe=lambda error: _describe(error, request),
        )
    completion = await while_connected(request.receive, collect(measured))
    return Response(_whole(writer, completion), media_type="application/json")


async def _events(
    deltas: AsyncGenerator[Delta, None], writer: Writer, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage = Usage()
    try:
        async for delta in deltas:
            usage = delta.usage
            yield event(writer.chunk(delta))
        if include_usage:
            yield event(writer.usage_chunk(usage))
    finally:
        await deltas.aclose()


def _whole(writer: Writer, completion: Completion) -> bytes:
    return writer.response(completion) if isinstance(writer, wire.ChatWriter) else writer.response([completion])


def _describe(error: Exception, request: Request) -> QvlError:
    request_id: str = request.scope["request_id"]
    logger.error("request %s failed in its stream", request_id, exc_info=error)
    return internal_error(request_id)


def _head(prefix: str, model: str | None, service: Service) -> wire.Head:
    """The id is ours, never the caller's `X-Request-Id`: two callers may send the same one."""
    return wire.Head(f"{prefix}-{uuid.uuid4().hex}", check_model(model, service.names), int(time.time()))


async def _parse(parse: Callable[[bytes], T], request: Request, metrics: Metrics) -> T:
    """The body, whatever its content type says, in the words of `qvl.types`. Raises `InvalidRequest`."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise InvalidRequest(f"this server reads no compressed bodies (Content-Encoding: {encoding[:40]})")
    begun = time.perf_counter()
    pieces = await _read(request)
    received = time.perf_counter()
    if sum(map(len, pieces)) <= PARSE_HERE_BYTES:
        call = parse(b"".join(pieces))
    else:
        call = await asyncio.get_running_loop().run_in_executor(_parser, lambda: parse(b"".join(pieces)))
    metrics.request_stage("receive", received - begun)
    metrics.request_stage("parse", time.perf_counter() - received)
    return call


async def _read(request: Request) -> list[bytes]:
    pieces: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return pieces


def _json(body: dict[str, Any] | Sequence[Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
