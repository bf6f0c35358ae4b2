"""The API key guards everything but health, however the address is written."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import requests

from qvl.backends.echo import EchoBackend
from qvl.server.options import ServerOptions
from tests.server.live import Live, live

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    options = ServerOptions(
        api_keys=("first-key", "second-key"), root_path="/prefix", cors_origins=("https://a.example",)
    )
    with live(EchoBackend(), options) as running:
        yield running


def status_of(server: Live, target: str, headers: str = "", method: str = "GET") -> int:
    """As a raw request line: an HTTP library would tidy the address up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())
        return int(sock.recv(65536).split(b" ")[1])


def test_health_and_ready_need_no_key(guarded: Live) -> None:
    for path in ("/health", "/ready", "/prefix/health", "/prefix/ready"):
        assert status_of(guarded, path) == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "//v1/models",
        "/v1//models",
        "/%2fv1/models",
        "/v1%2fmodels",
        "/prefix/v1/models",
        "/prefix//v1/models",
        "/prefix/prefix/v1/models",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health//",
        "//health",
        "/health/",
        "/health%00",
        "/HEALTH",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/version",
        "/tokenize",
        "/v1/models?path=/health",
        "/v1/models;/health",
        "http://x/v1/models",
        "/nothing",
    ],
)
def test_everything_else_does(guarded: Live, target: str) -> None:
    assert status_of(guarded, target) == 401
    assert status_of(guarded, target, method="POST") == 401


def test_any_of_the_keys_opens(guarded: Live) -> None:
    for headers in (
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer second-key"},
        {"X-Api-Key": "first-key"},
    ):
        assert guarded.get("/v1/models", headers=headers).status_code == 200
        assert guarded.get("/prefix/v1/models", headers=headers).status_code == 200
        assert guarded.post("/v1/chat/completions", HELLO, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "first-key",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-keyy",
        "Basic first-key",
        "Bearer FIRST-KEY",
    ],
)
def test_nothing_else_opens(guarded: Live, value: str) -> None:
    reply = guarded.get("/v1/models", headers={"Authorization": value})
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]


def test_a_wrong_key_is_told_before_the_body_is_read(guarded: Live) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=120) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_a_browser_may_ask_first_and_sees_errors(guarded: Live) -> None:
    origin = {"Origin": "https://a.example"}
    asked = requests.options(
        guarded.url + "/v1/chat/completions",
        headers={**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"},
        timeout=120,
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://a.example"
    assert guarded.get("/v1/models", headers=origin).headers["access-control-allow-origin"] == "https://a.example"
    other = guarded.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
