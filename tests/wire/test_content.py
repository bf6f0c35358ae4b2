"""Messages in every spelling that clients use, and the 400 that shows the right form."""

from __future__ import annotations

from typing import Any

import pytest

from qvl import wire
from qvl.errors import InvalidRequest
from qvl.types import MediaPart, Message, PixelLimits, TextPart
from qvl.wire.content import MAX_PARTS, read_messages

URL = "https://example.com/a.png"
DATA = "data:image/jpeg;base64,AAAA"


def parse(*messages: Any) -> tuple[Message, ...]:
    return wire.parse_chat({"messages": list(messages)}).request.messages


def parts_of(*parts: Any) -> tuple[Any, ...]:
    return parse({"role": "user", "content": list(parts)})[0].parts


def refused(*messages: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(*messages)
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages")
    return caught.value


def refused_part(part: Any) -> InvalidRequest:
    return refused({"role": "user", "content": [part]})


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_is_a_string_or_a_list_in_every_role(role: str) -> None:
    text = (TextPart("hi"),)
    assert parse({"role": role, "content": "hi"})[0] == Message(role, text)  # type: ignore[arg-type]
    assert parse({"role": role, "content": [{"type": "text", "text": "hi"}]})[0].parts == text
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"role": role, "content": two})[0].parts == (TextPart("a"), TextPart("b"))


def test_roles_and_message_fields() -> None:
    assert parse({"role": "developer", "content": "x"})[0].role == "system"
    assert parse({"role": "tool", "content": "x", "tool_call_id": "call_1"})[0].role == "tool"
    echo = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    assert parse(echo)[0] == Message("assistant", (TextPart("x"),))
    litellm = {"role": "assistant", "content": "x", "provider_specific_fields": {"refusal": None}, "images": None}
    assert parse(litellm)[0] == Message("assistant", (TextPart("x"),))
    assert parse({"role": "assistant", "content": None})[0].parts == ()
    assert parse({"role": "user", "content": ""})[0].parts == (TextPart(""),)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_who_speaks_is_a_label(role: str) -> None:
    """AutoGen sends it with every message."""
    assert parse({"role": role, "content": "hi", "name": "bob"}) == parse({"role": role, "content": "hi"})


def test_labels_of_parts() -> None:
    """Of vLLM and of Anthropic."""
    text, picture = {"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": URL}}
    labelled = {**text, "cache_control": {"type": "ephemeral"}}, {**picture, "uuid": "cat-1"}
    assert parts_of(*labelled) == parts_of(text, picture)
    assert "uuid" in refused_part({"type": "image_url", "image_url": {"url": URL, "uuid": "cat-1"}}).message


LIMITED: list[tuple[dict[str, Any], MediaPart]] = [
    ({"type": "image_url", "image_url": {"url": URL}}, MediaPart("image", URL)),
    ({"type": "image_url", "image_url": {"url": DATA, "detail": "auto"}}, MediaPart("image", DATA)),
    ({"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, MediaPart("image", URL)),
    (
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        MediaPart("image", URL, PixelLimits(max_pixels=512 * 512)),
    ),
    (
        {"type": "image_url", "image_url": {"url": URL, "detail": "low", "min_pixels": 10**6}},
        MediaPart("image", URL, PixelLimits(min_pixels=10**6, max_pixels=10**6)),
    ),
    (
        {"type": "image_url", "image_url": {"url": URL, "detail": "low", "max_pixels": 9000}},
        MediaPart("image", URL, PixelLimits(max_pixels=9000)),
    ),
    (
        {"type": "image_url", "image_url": {"url": URL, "min_pixels": 5, "max_pixels": 9000}},
        MediaPart("image", URL, PixelLimits(5, 9000)),
    ),
    (
        {"type": "image_url", "image_url": {"url": URL}, "max_pixels": 9000},
        MediaPart("image", URL, PixelLimits(max_pixels=9000)),
    ),
    ({"type": "image", "image": URL}, MediaPart("image", URL)),
    ({"type": "image", "image": "file:///a/b.png"}, MediaPart("image", "file:///a/b.png")),
    ({"type": "image", "image": "/a/b.png"}, MediaPart("image", "/a/b.png")),
    ({"type": "image", "image": DATA, "max_pixels": 9000}, MediaPart("image", DATA, PixelLimits(max_pixels=9000))),
    ({"type": "image", "url": URL}, MediaPart("image", URL)),
    ({"image": URL}, MediaPart("image", URL)),
    ({"type": "video_url", "video_url": {"url": URL}}, MediaPart("video", URL)),
    (
        {"type": "video_url", "video_url": {"url": URL, "fps": 1, "max_pixels": 9000}},
        MediaPart("video", URL, PixelLimits(max_pixels=9000, fps=1.0)),
    ),
    ({"type": "video_url", "video_url": {"url": URL}, "fps": 2}, MediaPart("video", URL, PixelLimits(fps=2.0))),
    ({"type": "video", "video": URL, "num_frames": 8}, MediaPart("video", URL, PixelLimits(num_frames=8))),
    ({"type": "video", "video": URL, "nframes": 8}, MediaPart("video", URL, PixelLimits(num_frames=8))),
    (
        {"type": "image", "image": URL, "resized_height": 280, "resized_width": 420},
        MediaPart("image", URL, PixelLimits(resized_height=280, resized_width=420)),
    ),
    ({"type": "video", "video": URL, "total_pixels": 99}, MediaPart("video", URL, PixelLimits(total_pixels=99))),
    ({"type": "video", "video": [URL, DATA], "fps": 0.5}, MediaPart("video", (URL, DATA), PixelLimits(fps=0.5))),
]  # fmt: skip


@pytest.mark.parametrize(("part", "expected"), LIMITED)
def test_pictures_and_videos_in_every_spelling(part: dict[str, Any], expected: MediaPart) -> None:
    assert parts_of(part, {"type": "text", "text": "x"}) == (expected, TextPart("x"))


def test_a_bare_string_for_image_url_shows_the_right_form() -> None:
    for kind in ("image_url", "video_url"):
        error = refused_part({"type": kind, kind: URL})
        assert error.param == f"messages[0].content[0].{kind}"
        assert f'"{kind}": {{"url": ' in error.message
        assert URL not in error.message


@pytest.mark.parametrize(
    ("part", "param", "says"),
    [
        ("hello", "content[0]", '{"type": "text"'),
        (None, "content[0]", '{"type": "text"'),
        ({"type": "imgae_url"}, "content[0].type", "did you mean 'image_url'?"),
        ({"type": "input_audio", "input_audio": {}}, "content[0].type", "must be one of"),
        ({"type": "input_image", "image_url": URL}, "content[0].type", "did you mean 'image_url'?"),
        ({"type": "input_text", "text": "x"}, "content[0].type", "did you mean 'text'?"),
        ({"type": 5}, "content[0].type", "must be one of"),
        ({"type": []}, "content[0].type", "must be one of"),
        ({}, "content[0].type", "must be one of"),
        ({"type": "text"}, "content[0].text", "must be a string"),
        ({"type": "text", "text": 5}, "content[0].text", "must be a string"),
        ({"type": "text", "text": "\ud800"}, "content[0].text", "surrogates"),
        ({"type": "text", "text": "x", "citations": {}}, "content[0]", "'citations' is not supported"),
        ({"type": "image_url"}, "content[0].image_url", "must be an object"),
        ({"type": "image_url", "image_url": {}}, "content[0].image_url.url", "must be a string"),
        ({"type": "image_url", "image_url": {"url": 5}}, "content[0].image_url.url", "must be a string"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "max"}}, "content[0].detail", "auto, low or high"),
        ({"type": "image_url", "image_url": {"url": URL, "max_pixel": 5}}, "content[0].image_url", "mean 'max_pixels'"),
        ({"type": "image_url", "image_url": {"url": URL, "max_pixels": 0}}, "content[0].max_pixels", "from 1 to"),
        ({"type": "image_url", "image_url": {"url": URL, "max_pixels": True}}, "content[0].max_pixels", "from 1 to"),
        ({"type": "image_url", "image_url": {"url": URL, "max_pixels": 1e6}}, "content[0].max_pixels", "from 1 to"),
        ({"type": "image", "image": URL, "min_pixels": 9, "max_pixels": 5}, "content[0].min_pixels", "above max"),
        ({"type": "image", "image": [URL]}, "content[0].image", "must be a string"),
        ({"type": "image", "image": URL, "fps": 1}, "content[0]", "'fps' is not supported"),
        ({"type": "image", "image": URL, "resized_height": 280}, "content[0]", "together"),
        ({"type": "image", "image": URL, "total_pixels": 28000}, "content[0]", "'total_pixels' is not supported"),
        ({"type": "video", "video": []}, "content[0].video", "1 to 768 frames"),
        ({"type": "video", "video": [URL] * 769}, "content[0].video", "1 to 768 frames"),
        ({"type": "video", "video": [URL, 5]}, "content[0].video[1]", "must be a string"),
        ({"type": "video", "video": URL, "fps": 0}, "content[0].fps", "above 0"),
        ({"type": "video", "video": URL, "fps": float("nan")}, "content[0].fps", "above 0"),
        ({"type": "video", "video": URL, "fps": 10**400}, "content[0].fps", "above 0"),
        ({"type": "video", "video": URL, "fps": 1, "nframes": 4}, "content[0].nframes", "not both"),
        ({"type": "video", "video": URL, "nframes": 10**9}, "content[0].nframes", "from 1 to 768"),
    ],
)  # fmt: skip
def test_bad_parts(part: Any, param: str, says: str) -> None:
    error = refused_part(part)
    assert error.param == f"messages[0].{param}"
    assert says in error.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        (None, "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "boss", "content": "x"}, "messages[1].role"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "user\n", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "messages[1].content"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls"),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "messages[1].reasoning_content"),
        ({"role": "assistant", "content": "x", "provider_specific_fields": {"a": 1}},
         "messages[1].provider_specific_fields"),
        ({"role": "user", "content": "x", "contents": "y"}, "messages[1]"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[1].tool_call_id"),
    ],
)  # fmt: skip
def test_bad_messages(message: Any, param: str) -> None:
    assert refused({"role": "user", "content": "fine"}, message).param == param


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": ""}] * (MAX_PARTS + 1),
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * MAX_PARTS}],
        [{"role": "user", "content": []}, {"role": "user", "content": [0] * MAX_PARTS}],
    ],
)
def test_a_million_tiny_messages_or_parts(messages: list[Any]) -> None:
    """They are refused before a template is busy with them for seconds."""
    assert "takes at most 20000" in str(refused(*messages))


def test_a_program_of_ones_own_may_send_as_many_as_it_likes() -> None:
    assert len(read_messages([{"role": "user", "content": ""}] * (MAX_PARTS + 1), in_process=True)) == MAX_PARTS + 1


def test_programs_may_hold_pictures_in_memory() -> None:
    picture = object()
    content = [
        {"type": "image", "image": picture},
        {"type": "video", "video": (picture, b"x")},
        {"image_url": {"url": b"y"}},
    ]
    (message,) = wire.read_messages([{"role": "user", "content": content}], in_process=True)
    assert message.parts == (MediaPart("image", picture), MediaPart("video", (picture, b"x")), MediaPart("image", b"y"))
    with pytest.raises(InvalidRequest, match="is missing"):
        wire.read_messages([{"role": "user", "content": [{"type": "image"}]}], in_process=True)
    with pytest.raises(InvalidRequest, match="must be a string"):
        wire.read_messages([{"role": "user", "content": content}])
