"""Fetching over real sockets on loopback: what must work, what must be refused, and what must not hang or grow."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import subprocess
import threading
import zlib

import pytest

from qvl.errors import BadMedia, InvalidRequest, MediaRefused, PayloadTooLarge
from qvl.media import guard, http
from qvl.media.fetch import MediaPolicy, read

STRICT = MediaPolicy()
OPEN = MediaPolicy(allow_private_hosts=True, max_bytes=1 << 20, read_timeout=60, total_timeout=120)


def fetch(url: str, policy: MediaPolicy = OPEN) -> bytes:
    return read(url, policy, expect="image")


def refuse(url: str, policy: MediaPolicy = STRICT, error: type[InvalidRequest] = MediaRefused) -> str:
    """The refusal's text, which must not carry the address."""
    with pytest.raises(error) as caught:
        fetch(url, policy)
    assert type(caught.value) is error
    for secret in ("127.0", "localhost", "secret"):
        assert secret not in caught.value.message
    assert caught.value.status in (400, 413)
    return caught.value.message


@pytest.fixture
def public_second_site(second_site, monkeypatch):
    """127.0.0.2 counts as public; 127.0.0.1 does not."""
    monkeypatch.setattr(guard, "is_public", lambda address: address == "127.0.0.2")
    return second_site


def test_a_picture_by_url(site):
    assert fetch(site.url("red.png")) == site.files["red.png"]
    path, headers = site.seen[0]
    assert path == "/red.png"
    assert headers["Host"] == f"127.0.0.1:{site.server_port}"
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


def test_scheme_in_any_case_and_query(site):
    assert fetch(site.url("red.png?a=%20b&c").replace("http:", "HtTp:")) == site.files["red.png"]
    assert site.seen[0][0] == "/red.png?a=%20b&c"


def test_loopback_is_refused_without_the_flag_and_never_called(site):
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]", "0.0.0.0"):
        with pytest.raises((MediaRefused, BadMedia)):
            fetch(site.url("red.png", host), STRICT)
    assert site.seen == []


def test_metadata_address_is_refused():
    assert "private" in refuse("http://169.254.169.254/latest/meta-data/")
    assert "private" in refuse("http://[fd00:ec2::254]/")


def test_a_public_address_passes(public_second_site):
    assert fetch(public_second_site.url("blue.png"), STRICT) == public_second_site.files["blue.png"]


def test_a_redirect_into_the_private_network_is_refused(site, public_second_site):
    refuse(public_second_site.url("redirect?" + site.url("red.png")))
    assert site.seen == []
    assert len(public_second_site.seen) == 1


def test_a_name_that_resolves_differently_the_second_time(site, public_second_site, monkeypatch):
    """The name is public when it is checked and private ever after. Only the checked address may be called."""
    real = socket.getaddrinfo
    asked: list[str] = []

    def rebinding(host, port, *args, **kwargs):
        if host != "rebind.example":
            return real(host, port, *args, **kwargs)
        asked.append(host)
        return real("127.0.0.2" if len(asked) == 1 else "127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    url = public_second_site.url("blue.png", "rebind.example")
    assert fetch(url, STRICT) == public_second_site.files["blue.png"]
    assert public_second_site.seen[0][1]["Host"] == f"rebind.example:{public_second_site.server_port}"
    assert len(asked) == 1
    refuse(url)  # asked again, it is private now
    assert site.seen == []


def test_a_rebinding_between_redirects(site, public_second_site, monkeypatch):
    real = socket.getaddrinfo
    addresses = iter(["127.0.0.2", "127.0.0.1"])
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kw: real(next(addresses) if host.endswith(".example") else host, *args, **kw),
    )
    # Another port, so that the redirect needs a connection of its own.
    refuse(public_second_site.url("redirect?" + site.url("red.png", "rebind.example"), "rebind.example"))
    assert site.seen == []


@pytest.mark.parametrize(
    "url",
    [
        r"http://127.0.0.2\@127.0.0.1/red.png",
        r"http://evil.example\red.png",
        r"http://example.com/a\b",
        "http://user@example.com/",
        "http://user:secret@example.com/",
        "http://exa mple.com/",
        "http://example.com/\nHost: other",
        "http://example.com/\x00",
        "http://example.com/a\tb",
        "http://",
        "http:///path",
        "http://example.com:99999/",
        "http://example.com:22/",
        "http://example.com:0/",
        "http://[::1/",
        "http://exa%6dple.com/",
        "http://example.com/" + "a" * 10_000,
        "ftp://example.com/a.png",
        "gopher://example.com/",
        "ws://example.com/",
    ],
)
def test_odd_urls_are_refused_before_a_name_is_resolved(url, monkeypatch):
    monkeypatch.setattr(guard, "resolve", lambda *_: pytest.fail("resolved"))
    refuse(url)


def test_redirects(site):
    assert fetch(site.url("down/5")) == site.files["red.png"]
    assert fetch(site.url("redirect?/red.png")) == site.files["red.png"]
    assert "more than 5 times" in refuse(site.url("down/6"), OPEN, BadMedia)
    assert "more than 5 times" in refuse(site.url("loop"), OPEN, BadMedia)


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://x/", "data:image/png,x", "http://a@127.0.0.1/", "//u:p@x/", "http://[", ""]
)
def test_redirects_to_anything_but_a_plain_http_address(site, target):
    with pytest.raises(InvalidRequest):
        fetch(site.url("redirect?" + target))


def test_status_is_named_and_the_body_is_not(site):
    assert "404" in refuse(site.url("nothing"), OPEN, BadMedia)
    assert "503" in refuse(site.url("error"), OPEN, BadMedia)


def test_compressed_bodies(site):
    assert fetch(site.url("gzip")) == site.files["red.png"]
    assert fetch(site.url("deflate")) == site.files["red.png"]
    for page in ("gzip-cut", "gzip-false", "brotli"):
        assert "compress" in refuse(site.url(page), OPEN, BadMedia)


def test_a_gzip_bomb_ends_at_the_cap(site):
    refuse(site.url("bomb"), OPEN, PayloadTooLarge)


def test_inflating_never_makes_more_than_a_byte_above_the_cap(site):
    policy = dataclasses.replace(OPEN, max_bytes=1000)
    steps: list[int] = []
    with pytest.raises(PayloadTooLarge):
        http._collect(
            (
                steps.append(len(part)) or part
                for part in http._decompress([zlib.compress(bytes(50 << 20))], "deflate", policy)
            ),
            policy,
        )
    assert steps == [1001]


def test_byte_caps(site):
    small = dataclasses.replace(OPEN, max_bytes=10)
    refuse(site.url("red.png"), small, PayloadTooLarge)
    refuse(site.url("no-length"), small, PayloadTooLarge)
    refuse(site.url("large"), OPEN, PayloadTooLarge)
    assert fetch(site.url("no-length")) == site.files["red.png"]
    exact = dataclasses.replace(OPEN, max_bytes=len(site.files["red.png"]))
    assert fetch(site.url("red.png"), exact) == site.files["red.png"]


def test_an_endless_body_is_left(site):
    refuse(site.url("endless"), OPEN, PayloadTooLarge)
    assert site.was_left.wait(120), "the connection is drained, not closed"
    assert site.sent < 64 << 20


@pytest.mark.parametrize(
    ("page", "limit"),
    [("silent", {"read_timeout": 0.2}), ("silent", {"total_timeout": 0.2}), ("drip", {"total_timeout": 0.3})],
)
def test_times(site, page, limit):
    """The pages do not end by themselves."""
    policy = dataclasses.replace(OPEN, **{"read_timeout": 3600, "total_timeout": 3600, **limit})
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(refuse(site.url(page), policy, BadMedia)), daemon=True)
    thread.start()
    thread.join(60)
    assert told


def test_a_caller_may_shorten_the_total(site):
    with pytest.raises(BadMedia):
        read(site.url("drip"), OPEN, expect="image", seconds=0.2)


def test_connections_that_fail(site):
    assert "connection" in refuse(site.url("cut"), OPEN, BadMedia)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        refuse(f"http://127.0.0.1:{taken.getsockname()[1]}/", OPEN, BadMedia)


def test_proxies_from_the_environment_are_not_used(site, second_site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, second_site.url())
    assert fetch(site.url("red.png")) == site.files["red.png"]
    assert second_site.seen == []


def test_tls_keeps_the_name_for_sni_and_certificate(tmp_path, monkeypatch):
    """A certificate for one name: connecting to the pinned address must still present and check that name."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-keyout", key, "-out", cert,
             "-subj", "/CN=named.example", "-addext", "subjectAltName=DNS:named.example"],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no openssl command")
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(cert, key)
    names: list[str | None] = []
    server_context.sni_callback = lambda _, name, __: names.append(name)
    trusting = ssl.create_default_context(cafile=str(cert))
    monkeypatch.setattr(http, "_tls", lambda: trusting)
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1" if host.endswith(".example") else host, *a, **k)
    )

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                plain, _address = listener.accept()
                try:
                    with server_context.wrap_socket(plain, server_side=True) as tls:
                        tls.recv(4096)
                        tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                except OSError:
                    plain.close()

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        assert fetch(f"https://named.example:{port}/") == b"ok"
        refuse(f"https://other.example:{port}/", OPEN, BadMedia)
    assert names == ["named.example", "other.example"]


@pytest.mark.parametrize("port", [1, 22, 25, 79, 81, 442, 444, 1023])
def test_low_ports_are_those_of_other_services(port):
    with pytest.raises(MediaRefused, match="ports 80, 443"):
        http.parse_url(f"http://example.com:{port}/a.png", STRICT)
    assert http.parse_url(f"http://example.com:{port}/a.png", OPEN).port == port


@pytest.mark.parametrize("address", ["http://example.com:1024/", "https://example.com:80/", "http://example.com:443/"])
def test_ports_that_may_be_called(address):
    assert str(http.parse_url(address, STRICT)) == address
