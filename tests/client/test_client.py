"""The client against a real server (the echo backend), and against bytes that no server of ours would send."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvl import wire
from qvl.backends.echo import EchoBackend
from qvl.bench.load.http import Address
from qvl.client import Client, EventReader, body_of, collect, media_kind, question
from qvl.errors import InvalidRequest, ModelNotFound, Overloaded, RequestFailed, Unauthorized, Unavailable
from qvl.media.fetch import MediaPolicy, read
from qvl.media.image import decode_image
from qvl.server.options import ServerOptions
from qvl.types import Delta, MediaPart, Message, SamplingParams, TextPart, Usage
from tests.server.live import Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(EchoBackend("parrot")) as running:
        yield running


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dot.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


def sent(*media: object) -> list[dict[str, object]]:
    """The content parts of a question as they go over the wire."""
    from qvl.types import ChatRequest

    content: list[dict[str, object]] = body_of(ChatRequest(question("What?", media)), "m")["messages"][0]["content"]
    return content


def test_an_answer_whole_and_in_pieces(server: Live, picture: Path) -> None:
    with Client(server.url) as client:
        assert client.ready()
        assert client.models() == ["parrot"]
        assert client.ask("héllo, 世界 \u2028 👩‍👩‍👧", picture) == "héllo, 世界 \u2028 👩‍👩‍👧 [1 image]"
        deltas = list(client.stream("one two"))
        completion = client.chat("one two")
    assert "".join(delta.text for delta in deltas) == completion.text == "one two"
    assert len(deltas) > 5
    assert completion.usage == Usage(7, 7)
    assert completion.answers[0].finish_reason == "stop"


def test_sampling_reaches_the_server(server: Live) -> None:
    with Client(server.url + "/v1/") as client:
        cut = client.chat("abcdefgh", SamplingParams(max_tokens=3, n=2))
        stopped = client.chat("abcdefgh", SamplingParams(stop=("f",)))
    assert [answer.text for answer in cut.answers] == ["abc", "abc"]
    assert cut.answers[1].finish_reason == "length"
    assert (stopped.text, stopped.answers[0].stop_reason) == ("abcde", "f")


def test_conversations_of_messages_and_of_dicts_are_the_same(server: Live) -> None:
    ours = [Message("system", (TextPart("Be brief."),)), Message("user", (TextPart("Hi"),))]
    theirs = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with Client(server.url) as client:
        assert client.chat(ours) == client.chat(theirs)


def test_errors_keep_their_class_and_words(server: Live) -> None:
    with Client(server.url, model="nightingale") as client, pytest.raises(ModelNotFound, match="parrot"):
        client.ask("Hi")
    with Client(server.url) as client, pytest.raises(InvalidRequest) as caught:
        client.chat([{"role": "king", "content": "Hi"}])
    assert caught.value.param == "messages[0].role"


def test_the_key_is_sent_and_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_API_KEY", raising=False)
    with live(EchoBackend(), ServerOptions(api_keys=("s3cret",))) as locked:
        with Client(locked.url) as client, pytest.raises(Unauthorized):
            client.ask("Hi")
        with Client(locked.url, api_key="s3cret") as client:
            assert client.ask("Hi") == "Hi"
        monkeypatch.setenv("QVL_API_KEY", "s3cret")
        with Client(locked.url) as client:
            assert client.ask("Hi") == "Hi"


@pytest.mark.parametrize("key", ["钥匙", "s3cret\n"])
def test_a_key_that_no_header_carries(key: str) -> None:
    with pytest.raises(InvalidRequest, match="the API key"):
        Client("http://127.0.0.1:9", api_key=key)
    with pytest.raises(InvalidRequest, match="the API key"):
        Address.read("http://127.0.0.1:9").request("GET", "/v1/models", api_key=key)


def test_the_address_is_read_from_the_environment(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_BASE_URL", server.url)
    with Client() as client:
        assert client.ask("Hi") == "Hi"


def test_leaving_the_loop_ends_the_work() -> None:
    with live(EchoBackend(seconds_per_token=0.01)) as slow, Client(slow.url) as client:
        stream = client.stream("x" * 3000)
        assert next(stream).text == "x"
        stream.close()
        slow.wait_metric("qvl_engine_aborted_total", 1)
        assert slow.metric("qvl_engine_running") == 0


def test_nobody_there() -> None:
    with Client("http://127.0.0.1:9") as client:
        assert not client.ready()
        with pytest.raises(Unavailable, match="qvl serve"):
            client.ask("Hi")


def test_pictures_of_this_machine_travel_without_loss(picture: Path) -> None:
    """Path, bytes, PIL picture and array: the server decodes the very same pixels."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    sources = [picture, str(picture), f"file://{picture}", picture.read_bytes(), Image.open(picture), pixels]
    for part in sent(*sources)[:-1]:
        url = part["image_url"]["url"]  # type: ignore[index]
        assert url.startswith("data:image/png;base64,")
        data = read(url, MediaPolicy(), expect="image")
        assert np.array_equal(decode_image(data, max_pixels=100), pixels)
    assert sent("https://example.com/a.jpg")[0] == {
        "type": "image_url",
        "image_url": {"url": "https://example.com/a.jpg"},
    }


def test_videos_travel_as_files_or_as_frames(tmp_path: Path, picture: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"not really a video")
    as_file, as_frames, _ = sent(clip, MediaPart("video", (picture, picture)))
    assert as_file["video_url"]["url"].startswith("data:video/mp4;base64,")  # type: ignore[index]
    assert [url[:22] for url in as_frames["video"]] == ["data:image/png;base64,"] * 2  # type: ignore[attr-defined]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere\.png"):
        sent(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("a.MP4", "video"),
        ("https://host/clip.webm?token=x.png", "video"),
        ("https://host/photo", "image"),
        ("data:video/mp4;base64,AA", "video"),
        ("data:image/png;base64,AA", "image"),
        (Path("x.mov"), "video"),
        (b"bytes", "image"),
    ],
)
def test_the_kind_of_a_file(source: object, kind: str) -> None:
    assert media_kind(source) == kind


EVENTS = [{"text": "a\u2028b\x0b\u0085"}, {"text": "\U0001f469‍\U0001f467"}, {}, {"n": 1}]
STREAM = b"".join(b"data: " + json.dumps(e, ensure_ascii=False).encode() + b"\r\n\r\n" for e in EVENTS)
STREAM = b": hello\n\nevent: x\n" + STREAM + b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_survive_any_cut(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    reader = EventReader()
    seen = [event for a, b in itertools.pairwise(bounds) for event in reader.feed(STREAM[a:b])]
    assert seen == EVENTS
    assert reader.done


@pytest.mark.parametrize("line", [b"data: {broken\n", b"data: [1]\n", b"data: \xff\n"])
def test_an_event_that_is_no_json_object(line: bytes) -> None:
    with pytest.raises(RequestFailed):
        EventReader().feed(line)


def client_for(handler: object) -> Client:
    return Client(model="m", retries=0, transport=httpx.MockTransport(handler))  # type: ignore[arg-type]


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    body = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    client = client_for(lambda _: httpx.Response(200, content=body))
    with pytest.raises(RequestFailed, match="before the answer was complete"):
        client.ask("Hi")


def test_an_error_inside_the_stream() -> None:
    body = b"data: " + json.dumps(wire.error_body(Unavailable("the engine died"))).encode() + b"\n\ndata: [DONE]\n\n"
    client = client_for(lambda _: httpx.Response(200, content=body))
    with pytest.raises(Unavailable, match="the engine died"):
        client.ask("Hi")


def test_a_busy_server_says_when_to_come_back() -> None:
    busy = wire.error_body(Overloaded("full"))
    client = client_for(lambda _: httpx.Response(429, json=busy, headers={"retry-after": "7"}))
    with pytest.raises(Overloaded) as caught:
        client.ask("Hi")
    assert caught.value.retry_after == 7


def test_something_that_is_no_server_of_this_kind() -> None:
    client = client_for(lambda _: httpx.Response(502, text="<html>Bad gateway</html>"))
    with pytest.raises(Exception, match="502"):
        client.ask("Hi")


def test_collect_joins_by_answer_and_keeps_the_last_usage() -> None:
    deltas = [
        Delta(1, "x", usage=Usage(3, 1)),
        Delta(0, "a", (7,), usage=Usage(3, 2)),
        Delta(0, "b", (8,), None, "stop", "END", usage=Usage(3, 3)),
        Delta(1, "", (), None, "length", usage=Usage(3, 3)),
        Delta(0, "", usage=Usage(3, 4, 1)),
    ]
    completion = collect(deltas)
    assert [answer.text for answer in completion.answers] == ["ab", "x"]
    assert completion.answers[0].token_ids == (7, 8)
    assert completion.answers[0].stop_reason == "END"
    assert completion.usage == Usage(3, 4, 1)
    assert [answer.finish_reason for answer in collect(deltas[:3]).answers] == ["stop", "abort"]


def test_a_picture_in_memory_is_not_changed() -> None:
    picture = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    url = sent(picture)[0]["image_url"]["url"]  # type: ignore[index]
    back = Image.open(io.BytesIO(read(url, MediaPolicy(), expect="image")))
    assert (back.mode, back.getpixel((0, 0))) == ("RGBA", (1, 2, 3, 4))
