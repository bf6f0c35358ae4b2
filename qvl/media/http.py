"""GET of one picture or video over http(s), for callers who are not trusted with the server's network.

Knows URLs, redirects, status codes and compressed bodies; bounds every one of them. The guard below decides which
addresses may be called. No proxies, cookies, credentials or settings from the environment are used. One parser
reads the URL, and what it read is what is connected to.
"""

from __future__ import annotations

import functools
import re
import ssl
import zlib
from collections.abc import Iterable, Iterator

import httpcore
import httpx

from qvl.errors import BadMedia, MediaRefused, PayloadTooLarge
from qvl.media.fetch import MediaPolicy
from qvl.media.guard import Deadline, GuardedBackend

MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192
_REDIRECTS = (301, 302, 303, 307, 308)
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_HEADERS = [
    (b"Accept", b"image/*, video/*;q=0.9, */*;q=0.1"),
    (b"Accept-Encoding", b"identity"),
    (b"User-Agent", b"qvl"),
]


def read_http(url: str, policy: MediaPolicy, seconds: float | None = None) -> bytes:
    """The body at `url`, after at most five redirects.

    Raises MediaRefused, PayloadTooLarge, BadMedia.
    """
    deadline = Deadline(policy.total_timeout if seconds is None else min(seconds, policy.total_timeout))
    backend = GuardedBackend(deadline, allow_private=policy.allow_private_hosts)
    try:
        with httpcore.ConnectionPool(ssl_context=_tls(), network_backend=backend) as pool:
            target = parse_url(url, policy)
            for _ in range(MAX_REDIRECTS + 1):
                answer = _get(pool, target, policy)
                if isinstance(answer, bytes):
                    return answer
                target = parse_url(answer, policy, base=target)
        raise BadMedia(f"the address redirects more than {MAX_REDIRECTS} times")
    except (httpcore.TimeoutException, TimeoutError):
        raise BadMedia("the address did not answer in time") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, ssl.SSLError, OSError):
        raise BadMedia("the address could not be fetched: the connection failed or broke off") from None


def parse_url(text: str, policy: MediaPolicy, base: httpx.URL | None = None) -> httpx.URL:
    """The URL, joined to `base` for a redirect, or an error that says what is wrong with it."""
    if len(text) > MAX_URL_CHARS or _UNSAFE.search(text):
        raise MediaRefused("the URL is too long, or has spaces, control characters or backslashes in it")
    try:
        url = httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError):
        raise MediaRefused("the URL cannot be understood") from None
    if url.scheme not in ("http", "https"):
        raise MediaRefused("only http and https addresses can be fetched")
    if url.userinfo:
        raise MediaRefused("URLs with a user name or password in them are not fetched")
    if not _HOST.fullmatch(url.raw_host.decode("ascii", "replace")):
        raise MediaRefused("the host in the URL cannot be understood")
    if url.port is not None and not 0 < url.port < 65536:
        raise MediaRefused("the port in the URL does not exist")
    # Below 1024 live mail, remote shells and the like: services that were never meant to be spoken HTTP to.
    if url.port is not None and url.port not in (80, 443) and url.port < 1024 and not policy.allow_private_hosts:
        raise MediaRefused("this server fetches from ports 80, 443 and those above 1023 only")
    return url


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Certificates are loaded once per process (tens of milliseconds)."""
    return httpx.create_ssl_context(trust_env=False)


def _get(pool: httpcore.ConnectionPool, url: httpx.URL, policy: MediaPolicy) -> bytes | str:
    """The body, or the Location of a redirect."""
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    read, connect = policy.read_timeout, policy.connect_timeout
    timeouts = {"connect": connect, "read": read, "write": read, "pool": connect}
    headers = [(b"Host", url.netloc), *_HEADERS]
    with pool.stream("GET", target, headers=headers, extensions={"timeout": timeouts}) as response:
        fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS and b"location" in fields:
            return fields[b"location"]
        if response.status != 200:
            raise BadMedia(f"the address answered with HTTP status {response.status}")
        length = fields.get(b"content-length", "")
        if length.isdigit() and int(length[:20]) > policy.max_bytes:
            raise _too_large(policy)
        encoding = fields.get(b"content-encoding", "identity").strip().lower()
        return _collect(_decompress(response.iter_stream(), encoding, policy), policy)


def _too_large(policy: MediaPolicy) -> PayloadTooLarge:
    return PayloadTooLarge(f"a picture or video may have at most {policy.max_bytes} bytes")


def _collect(chunks: Iterable[bytes], policy: MediaPolicy) -> bytes:
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) > policy.max_bytes:
            raise _too_large(policy)
    return bytes(body)


def _decompress(chunks: Iterable[bytes], encoding: str, policy: MediaPolicy) -> Iterator[bytes]:
    """Some servers compress though asked not to.

    No step makes more than a byte above the cap, however dense the bomb.
    """
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BadMedia("the address answered with a compression that was not asked for")
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
    try:
        for chunk in chunks:
            yield inflate.decompress(chunk, policy.max_bytes + 1)
    except zlib.error:
        raise BadMedia("the address answered with damaged compressed data") from None
    if not inflate.eof:
        raise BadMedia("the address answered with damaged compressed data")
