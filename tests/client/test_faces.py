"""The same bodies through `Client` and `AsyncClient`: a real server, and one that breaks off and refuses."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvl.backends.echo import EchoBackend
from qvl.client import Client, Retries
from qvl.errors import InvalidRequest, Overloaded, QvlError, RequestFailed, Unavailable
from qvl.media.fetch import MediaPolicy
from qvl.media.load import load
from qvl.specs import ProcessorSpec
from qvl.types import MediaPart, PictureRule, PixelLimits, SamplingParams, Usage
from tests.client.faces import FACES
from tests.client.misbehaving import STREAM, misbehaving, reply
from tests.server.live import Live, live

RULE = PictureRule(28, 3136, 28 * 28 * 64)
SPEC = ProcessorSpec(min_pixels=RULE.min_pixels, max_pixels=RULE.max_pixels)
QUICK = Retries(2, 0.01)
BUSY = b'{"error":{"message":"full","type":"rate_limit_error","code":"server_overloaded"}}'


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(EchoBackend("parrot", picture=RULE)) as running:
        yield running


@pytest.fixture(params=FACES, ids=["blocking", "awaited"])
def face(request: pytest.FixtureRequest) -> Any:
    return request.param


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_call(face: Any, server: Live, tmp_path: Path) -> None:
    path = tmp_path / "dot.png"
    Image.fromarray(noise(4, 4)).save(path)
    pictures = (path, str(path), path.read_bytes(), Image.open(path), noise(4, 4))
    with face(server.url) as client:
        assert client.ready()
        assert (client.models(), client.model) == (["parrot"], "parrot")
        assert client.ask("héllo 世界", *pictures[:4], system="Be brief.") == "héllo 世界 [4 images]"
        assert client.ask("What?", pictures[4]) == "What? [1 image]"
        deltas = list(client.stream("one two", SamplingParams(max_tokens=5)))
        completion = client.chat([{"role": "user", "content": "one two"}])
        assert client.tokens("four") == 4
    assert "".join(delta.text for delta in deltas) == "one t"
    assert (completion.text, completion.usage) == ("one two", Usage(7, 7))


def test_leaving_early_ends_the_work_on_the_server(face: Any) -> None:
    with live(EchoBackend(seconds_per_token=0.01)) as slow, face(slow.url) as client:
        stream = client.stream("x" * 3000)
        assert next(stream).text == "x"
        stream.close()
        slow.wait_metric("qvl_engine_aborted_total", 1)


@pytest.mark.parametrize("refusal", [reply("429 Busy", BUSY, "retry-after: 0"), reply("503 Not yet", b"{}")])
def test_what_was_not_taken_is_sent_again(face: Any, refusal: bytes) -> None:
    with misbehaving([refusal, refusal, reply("200 OK", STREAM)]) as server:
        with face(server.url, model="m", retries=QUICK) as client:
            assert client.ask("Hi") == "yes"
        assert server.posts("/v1/chat/completions") == 3


def test_a_refusal_that_lasts_is_told(face: Any) -> None:
    with misbehaving([reply("429 Busy", BUSY, "retry-after: 0")]) as server:
        with face(server.url, model="m", retries=QUICK) as client, pytest.raises(Overloaded, match="full"):
            client.ask("Hi")
        assert server.posts("/v1/chat/completions") == 3


def test_retry_after_is_kept_and_a_long_one_is_not_waited_for(face: Any) -> None:
    with misbehaving([reply("429 Busy", BUSY, "retry-after: 1"), reply("200 OK", STREAM)]) as server:
        began = time.monotonic()
        with face(server.url, model="m", retries=QUICK) as client:
            assert client.ask("Hi") == "yes"
        assert time.monotonic() - began >= 1
    with misbehaving([reply("429 Busy", BUSY, "retry-after: 3600")]) as server:
        with face(server.url, model="m") as client, pytest.raises(Overloaded) as caught:
            client.ask("Hi")
        assert (caught.value.retry_after, len(server.requests)) == (3600, 1)


HALF = b'data: {"choices":[{"index":0,"delta":{"content":"half"},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Unavailable),  # the request went out; whether it was worked on, nobody knows
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n" + HALF, Unavailable),
        (reply("200 OK", HALF), RequestFailed),
        (reply("200 OK", b'data: {"error":{"message":"gone","code":"engine_unavailable"}}\n\n'), Unavailable),
        (reply("500 Oops", b"{}"), QvlError),
        (reply("502 Bad gateway", b"<html>"), QvlError),
        (reply("504 Late", b"{}"), QvlError),
        (reply("200 OK", b"data: [broken\n\n"), RequestFailed),
        (b"this is not HTTP\r\n\r\n", Unavailable),
    ],
)
def test_what_may_have_been_answered_is_never_sent_again(face: Any, answer: bytes, error: type[QvlError]) -> None:
    with misbehaving([answer, reply("200 OK", STREAM)]) as server:
        with face(server.url, model="m", retries=QUICK) as client, pytest.raises(error):
            client.ask("Hi")
        assert server.posts("/v1/chat/completions") == 1


def test_a_server_that_says_nothing_runs_into_the_time_limit(face: Any) -> None:
    with (
        live(EchoBackend(seconds_per_token=5.0)) as slow,
        face(slow.url, model="echo", timeout=0.3) as client,
        pytest.raises(Unavailable, match="in time"),
    ):
        client.ask("Hi")


def test_nobody_there_and_no_address(face: Any) -> None:
    with face("http://127.0.0.1:9", retries=QUICK) as client:
        assert not client.ready()
        with pytest.raises(Unavailable, match="qvl serve"):
            client.models()
    with face("ftp://nonsense") as client, pytest.raises(InvalidRequest, match="no address"):
        client.models()


def test_a_server_that_starts_late_is_found() -> None:
    """Connect errors are tried again; the waits double."""
    assert [Retries(3, 1.0).wait(attempt, 0) is not None for attempt in range(4)] == [True, True, True, False]
    waits = [Retries(9, 1.0, 5.0).wait(attempt, 0) or 0 for attempt in range(5)]
    assert all(low <= wait <= 1.25 * low for low, wait in zip((1, 2, 4, 5, 5), waits, strict=True))
    assert Retries(2, 0.1).wait(0, 31) is None


def sent_pictures(face: Any, *media: Any, rule: dict[str, int] | None = None) -> list[str]:
    """The addresses in the request for a question about `media`, from a server that says `rule` of itself."""
    models = {"data": [{"id": "m", **({} if rule is None else {"picture": rule})}]}
    answers = [reply("200 OK", json.dumps(models).encode()), reply("200 OK", STREAM)]
    with misbehaving(answers) as server, face(server.url) as client:
        client.ask("What?", *media)
        body = json.loads(server.requests[-1].partition(b"\r\n\r\n")[2])
    return [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]


def seen(source: Any, limits: PixelLimits = PixelLimits()) -> tuple[tuple[int, ...], bytes]:
    part = MediaPart("image", source, limits)
    pixels = load(part, SPEC, MediaPolicy(allow_any_local_path=True), PixelLimits(), resize_here=True).pixels
    return pixels.shape, pixels.tobytes()


def told() -> dict[str, int]:
    return {"factor": RULE.factor, "min_pixels": RULE.min_pixels, "max_pixels": RULE.max_pixels}


@pytest.mark.parametrize("size", [(600, 900), (1000, 333), (520, 720)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_a_large_picture_is_sent_as_the_model_sees_it(face: Any, tmp_path: Path, size: Any, mode: str) -> None:
    """Fewer bytes, and the very pixels that the server would have made of the original: the same answer."""
    path = tmp_path / "large.png"
    Image.fromarray(noise(*size)).convert("I;16" if mode == "I;16" else mode).save(path)
    sources, want = (path, str(path), path.read_bytes(), Image.open(path)), seen(path)
    assert all(seen(source) == want for source in sources[1:])
    for url in sent_pictures(face, *sources, rule=told()):
        assert len(url) * 3 / 4 < path.stat().st_size
        assert seen(url) == want


def test_a_photo_held_sideways_and_an_array(face: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise(900, 1200)).save(path, exif=exif, quality=95)
    array = noise(640, 480)
    urls = sent_pictures(face, path, array, rule=told())
    assert len(urls[0]) < path.stat().st_size / 2
    assert [seen(url) for url in urls] == [seen(path), seen(array)]


def test_limits_of_one_picture_hold(face: Any) -> None:
    for limits in (PixelLimits(max_pixels=28 * 28 * 9), PixelLimits(resized_height=56, resized_width=84)):
        (url,) = sent_pictures(face, MediaPart("image", noise(500, 500), limits), rule=told())
        assert len(url) < 40_000
        assert seen(url, limits) == seen(noise(500, 500), limits)


def test_what_is_not_reduced(face: Any, tmp_path: Path) -> None:
    """Addresses, small files, what PNG would make larger, what nobody can read, and anything for a silent server."""
    small = io.BytesIO()
    Image.fromarray(np.full((900, 900, 3), 200, np.uint8)).save(small, "PNG")
    broken = b"\x89PNG" + bytes(100_000)
    large = tmp_path / "large.png"
    Image.fromarray(noise(300, 300)).save(large)
    url = "https://example.com/photo.jpg"
    urls = sent_pictures(face, url, small.getvalue(), broken, rule=told())
    assert urls[0] == url
    assert [len(one) for one in urls[1:]] == [(len(data) + 2) // 3 * 4 + 22 for data in (small.getvalue(), broken)]
    for rule in (None, {"factor": 28}, {**told(), "surprise": 1}):
        (whole,) = sent_pictures(face, large, rule=rule)
        assert len(whole) > large.stat().st_size


def test_a_real_server_tells_how_it_sees(server: Live) -> None:
    assert server.get("/v1/models").json()["data"][0]["picture"] == told()
    with Client(server.url) as client:
        client.ask("What?", noise(900, 900))
        assert len(client.models()) == 1
