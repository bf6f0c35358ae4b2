"""A network backend that connects only to public addresses: the address that was checked is the address that is called.

Knows name resolution, address ranges and deadlines. Does not know HTTP: it sits below it, so every connection of
every redirect passes here, and a name that resolves differently the second time is never asked a second time.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpcore

from qvl.errors import BadMedia, MediaRefused
from qvl.media.given_up import LOOK_EVERY_SECONDS, check_wanted

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Teredo and 6to4 are IPv4 in disguise; the last two are newer than some Pythons' own tables.
_SPECIAL = tuple(ipaddress.ip_network(net) for net in ("2001::/23", "2002::/16", "3fff::/20", "192.88.99.0/24"))


def is_public(address: str) -> bool:
    """Whether a numeric IPv4 or IPv6 address is one that the whole internet shares.

    False for loopback, private, link-local, shared (100.64/10), reserved, multicast and unspecified addresses,
    for IPv6 that wraps IPv4 (mapped, 6to4, Teredo), and for NAT64 unless the IPv4 address inside is public.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a name is not an address
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _GLOBAL_UNICAST:
            return False
    if any(ip in net for net in _SPECIAL):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_private or ip.is_unspecified)


class Deadline:
    """A moment after which a fetch, all its redirects included, is given up."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def clip(self, seconds: float | None) -> float:
        """`seconds`, or what is left where that is less.

        Raises BadMedia when nothing is left, or when nobody waits for the fetch any more.
        """
        check_wanted()
        left = self._end - time.monotonic()
        if left <= 0:
            raise BadMedia("fetching took too long")
        return left if seconds is None else min(seconds, left)


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """Numeric addresses of `host`.

    The system's resolver takes no time-out, so it runs in a thread that may be left behind.
    """
    found: list[str] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))

    thread = threading.Thread(target=look_up, daemon=True, name="qvl-resolve")
    thread.start()
    thread.join(seconds)
    if not found:
        raise BadMedia("the name of the host cannot be resolved")
    return list(found)


class GuardedBackend(httpcore.NetworkBackend):
    """TCP for one fetch: resolves once, checks, connects to what it checked, and ends everything at the deadline."""

    def __init__(self, deadline: Deadline, *, allow_private: bool) -> None:
        self._deadline = deadline
        self._allow_private = allow_private
        self._tcp = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = resolve(host, port, self._deadline.clip(timeout))
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise MediaRefused("this server does not fetch from private or local network addresses")
        failure: Exception | None = None
        for address in addresses:
            try:
                stream = self._tcp.connect_tcp(
                    address, port, self._deadline.clip(timeout), local_address, socket_options
                )
                return _TimedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    def sleep(self, seconds: float) -> None:
        time.sleep(self._deadline.clip(seconds))


class _TimedStream(httpcore.NetworkStream):
    """A stream whose every operation also ends at the deadline, so that slow drips add up to no more than it."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """In short waits: a server that says nothing must not hold the thread of a request that was given up."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(end - time.monotonic(), 0.001)
            wait = self._deadline.clip(left)
            try:
                return self._stream.read(max_bytes, min(wait, LOOK_EVERY_SECONDS))
            except httpcore.ReadTimeout:
                if end is not None and time.monotonic() >= end:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.clip(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.clip(timeout))
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
