"""Which addresses may be called, and that the one that was checked is the one that is called."""

from __future__ import annotations

import socket
import ssl
import threading

import httpcore
import pytest

from qvl.errors import BadMedia, MediaRefused
from qvl.media import guard
from qvl.media.guard import Deadline, GuardedBackend, is_public

FORBIDDEN = """
127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1
169.254.169.254 169.254.0.1 100.64.0.1 100.127.255.255 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1
224.0.0.1 239.255.255.255 192.88.99.1 240.0.0.1 255.255.255.255 :: ::1 ::2 ::127.0.0.1 ::ffff:127.0.0.1
::ffff:8.8.8.8 ::ffff:169.254.169.254 fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1 100::1 2001::1
2001:db8::1 2002:7f00:1:: 2002:808:808:: 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 3fff::1 localhost 1
nonsense
"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1111 2a00:1450:4001::200e 64:ff9b::808:808"


@pytest.mark.parametrize("address", FORBIDDEN.split())
def test_forbidden(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public(address):
    assert is_public(address)


def answers(*addresses: str):
    """A resolver that gives these, whatever it is asked."""
    return lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]


def backend(seconds: float = 60.0, *, allow_private: bool = False) -> GuardedBackend:
    return GuardedBackend(Deadline(seconds), allow_private=allow_private)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0",
        "::1",
        "::ffff:127.0.0.1",
        "0x7f.1",
    ],
)
def test_every_spelling_of_loopback_is_refused_before_a_connection(host, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with pytest.raises((MediaRefused, BadMedia)) as caught:  # BadMedia where this system does not resolve the spelling
        backend().connect_tcp(host, 80, timeout=60)
    assert host not in caught.value.message


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers("8.8.8.8", "10.0.0.1"))
    with pytest.raises(MediaRefused):
        backend().connect_tcp("mixed.example", 80)


def test_connects_to_the_very_address_that_was_checked(monkeypatch):
    called: list[str] = []

    class Tcp(httpcore.NetworkBackend):
        def connect_tcp(self, host, *_):
            called.append(host)
            if len(called) == 1:
                raise httpcore.ConnectError
            return httpcore.NetworkStream()

    questions: list[str] = []

    def resolver(host, port, **_):
        questions.append(host)
        return answers("8.8.8.8", "8.8.4.4")(host, port) if len(questions) == 1 else answers("127.0.0.1")(host, port)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    guarded = backend()
    guarded._tcp = Tcp()
    guarded.connect_tcp("rebind.example", 80)
    assert called == ["8.8.8.8", "8.8.4.4"]  # the second after the first failed, the name never again
    assert questions == ["rebind.example"]


def test_a_resolver_that_hangs_is_given_up(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(30) and [])
    with pytest.raises(BadMedia, match="resolved"):
        guard.resolve("slow.example", 80, 0.05)
    done.set()


def test_unknown_and_impossible_names(monkeypatch):
    for failure in (socket.gaierror, UnicodeError):

        def fail(*_, failure=failure, **__):
            raise failure

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        with pytest.raises(BadMedia, match="resolved"):
            guard.resolve("nobody.example", 80, 60)


def test_deadline():
    assert Deadline(100).clip(3) == 3
    assert Deadline(3).clip(None) <= 3
    with pytest.raises(BadMedia, match="too long"):
        Deadline(0).clip(3)


class Wire(httpcore.NetworkStream):
    """Notes the time-outs it is given."""

    def __init__(self):
        self.timeouts = []

    def write(self, buffer, timeout=None):
        self.timeouts.append(timeout)

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        self.timeouts.append(timeout)
        return self


def test_a_stream_keeps_to_the_deadline_behind_tls_too():
    wire = Wire()
    stream = guard._TimedStream(wire, Deadline(50)).start_tls(ssl.create_default_context(), "a.example", 1000)
    stream.write(b"x", 1000)
    stream.write(b"x", 3)
    assert [timeout <= 50 for timeout in wire.timeouts] == [True, True, True]
    assert wire.timeouts[2] == 3
    with pytest.raises(BadMedia, match="too long"):
        guard._TimedStream(wire, Deadline(0)).write(b"x")
