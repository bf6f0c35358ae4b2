"""A server of this machine alone is called by this machine's names: a page whose name resolves to it is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qvl.backends.echo import EchoBackend
from qvl.server.hosts import needs_guard
from qvl.server.options import ServerOptions
from tests.server.live import Live, live

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(EchoBackend("parrot"), ServerOptions(allowed_hosts=("Vision.Example.com",))) as running:
        yield running


@pytest.mark.parametrize("host", ["evil.com", "evil.com:8000", "127.0.0.1.nip.io", "localhost.evil.com", "EVIL.com."])
def test_a_name_that_others_may_own_is_refused(server: Live, host: str) -> None:
    replies = [server.post("/v1/chat/completions", HELLO, headers={"Host": host})]
    replies += [server.get(path, headers={"Host": host}) for path in ("/v1/models", "/metrics", "/docs", "/health")]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_refused")
        assert "--allowed-host" in reply.json()["error"]["message"] and reply.headers["x-request-id"]


@pytest.mark.parametrize("port", ["", ":8000"])
@pytest.mark.parametrize(
    "name",
    "127.0.0.1 [::1] 192.168.1.5 localhost LOCALHOST localhost. a.localhost workstation host.docker.internal box.local "
    "vision.example.com VISION.example.com".split(),
)
def test_names_of_this_machine_and_allowed_ones_are_served(server: Live, name: str, port: str) -> None:
    assert server.post("/v1/chat/completions", HELLO, headers={"Host": name + port}).status_code == 200


@pytest.mark.parametrize(
    "options, guarded",
    [
        (ServerOptions(), True),
        (ServerOptions(host="localhost"), True),
        (ServerOptions(host="::1"), True),
        (ServerOptions(host="127.1.2.3"), True),
        (ServerOptions(host="0.0.0.0"), False),
        (ServerOptions(host="192.168.1.5"), False),
        (ServerOptions(host="vision.example.com"), False),
        (ServerOptions(api_keys=("secret",)), False),
        (ServerOptions(allowed_hosts=("*",)), False),
    ],
)
def test_who_needs_no_more_than_to_be_here_is_guarded(options: ServerOptions, guarded: bool) -> None:
    assert needs_guard(options) is guarded
