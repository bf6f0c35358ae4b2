"""The app factory: which layers a request passes, in which order, and what lives as long as the app.

Outermost first: border (ids, counting, last resort), the server's name, CORS, API key, admission, body limit, routes.
Knows the order. Does not know what a route does, nor which backend answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from qvl import __version__
from qvl.backends.base import Backend
from qvl.errors import QvlError
from qvl.server.auth import ApiKeyMiddleware
from qvl.server.border import BorderMiddleware
from qvl.server.counts import Counts
from qvl.server.failures import error_response, http_exception_response, internal_error, logger
from qvl.server.hosts import HostMiddleware, needs_guard
from qvl.server.limits import AdmissionMiddleware, BodyLimitMiddleware
from qvl.server.openapi import describe
from qvl.server.options import ServerOptions
from qvl.server.pages import add_pages
from qvl.server.routes import add_routes
from qvl.server.service import Service

Started = Callable[[QvlError | None], None]

ABOUT = "OpenAI-compatible vision API. Errors are OpenAI error bodies; answers carry the header X-Request-Id."


def create_app(
    backend: Backend,
    options: ServerOptions,
    on_started: Started | None = None,
    counts: Counts | None = None,
    summaries: Path | None = None,
) -> FastAPI:
    """The ASGI app. Its lifespan starts the backend beside the server, so that /health answers at once.

    `on_started` is called once, on the loop: with None when requests can be answered, with the error when that will
    never be so. `counts`, and the file `summaries`, are given where this app is one process of several.
    """
    service = Service(backend, options, counts or Counts(), summaries)
    app = FastAPI(
        title="qvl",
        version=__version__,
        description=ABOUT,
        lifespan=_lifespan(service, on_started),
        middleware=_layers(service),
        exception_handlers={QvlError: _known, HTTPException: _http, Exception: _unknown},
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    add_routes(app.router, service)
    add_pages(app.router, service)
    return app


def _layers(service: Service) -> list[Middleware]:
    options = service.options
    layers = [Middleware(BorderMiddleware, metrics=service.metrics, root_path=options.root_path)]
    if needs_guard(options):
        layers.append(Middleware(HostMiddleware, allowed=options.allowed_hosts))
    if options.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    if options.api_keys:
        layers.append(Middleware(ApiKeyMiddleware, api_keys=options.api_keys, root_path=options.root_path))
    layers.append(Middleware(AdmissionMiddleware, admission=service.admission))
    layers.append(Middleware(BodyLimitMiddleware, options=options, counts=service.counts))
    return layers


def _lifespan(service: Service, on_started: Started | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(service, on_started))
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await service.backend.stop()

    return lifespan


async def _start(service: Service, on_started: Started | None) -> None:
    error: QvlError | None = None
    try:
        await service.backend.start()
    except QvlError as failure:
        service.start_error = error = failure
    if on_started is not None:
        on_started(error)
    elif error is not None:
        logger.error("the backend cannot start: %s", error.message)


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, QvlError)
    return error_response(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = [route.path for route in request.app.routes if isinstance(route, APIRoute)]
    return http_exception_response(error, request.scope["path"], routes)


async def _unknown(request: Request, error: Exception) -> Response:
    """Only the answer: the exception goes on to the border, which writes it to the log."""
    return error_response(internal_error(request.scope["request_id"]))
