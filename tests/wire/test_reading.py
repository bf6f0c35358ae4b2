"""The other direction: what one side writes, the other reads back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl import wire
from qvl.errors import (
    BadMedia,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    QvlError,
    RequestFailed,
    TooManyMedia,
    Unauthorized,
    Unavailable,
)
from qvl.types import (
    Answer,
    ChatRequest,
    Completion,
    CompletionRequest,
    Delta,
    MediaPart,
    Message,
    PixelLimits,
    SamplingParams,
    TextPart,
    TokenLogprob,
    Usage,
)

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
areas = st.none() | st.integers(1, 2**31 - 1)
token_ids = st.integers(0, 2**31 - 1)


@st.composite
def pixel_limits(draw: st.DrawFn, *, video: bool) -> PixelLimits:
    low, high = sorted((draw(st.integers(1, 10**6)), draw(st.integers(1, 10**6))))
    fps, frames = draw(st.none() | st.floats(0.1, 60)), None
    if fps is None:
        frames = draw(st.none() | st.integers(1, 768))
    return PixelLimits(
        low if draw(st.booleans()) else None,
        high if draw(st.booleans()) else None,
        fps if video else None,
        frames if video else None,
    )


pictures = st.builds(MediaPart, st.just("image"), words, pixel_limits(video=False))
videos = st.builds(
    MediaPart, st.just("video"), words | st.lists(words, min_size=1, max_size=3).map(tuple), pixel_limits(video=True)
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.lists(st.builds(TextPart, words) | pictures | videos, max_size=4).map(tuple),
)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    def maybe(low: float, high: float) -> float | None:
        return draw(st.none() | st.floats(low, high))

    max_tokens = draw(st.none() | st.integers(50, 1000))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, 50)),
        temperature=maybe(0, 100),
        top_p=maybe(0.01, 1),
        top_k=draw(st.none() | st.integers(-1, 1000)),
        min_p=maybe(0, 1),
        repetition_penalty=maybe(0.01, 100),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        stop=tuple(draw(st.lists(words.filter(bool), max_size=3))),
        stop_token_ids=tuple(draw(st.lists(token_ids, max_size=3))),
        ignore_eos=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100), max_size=3)),
        logprobs=draw(st.none() | st.integers(0, 20)),
        n=draw(st.integers(1, 64)),
    )


@st.composite
def chat_requests(draw: st.DrawFn) -> ChatRequest:
    continues = draw(st.booleans())
    return ChatRequest(
        messages=tuple(draw(st.lists(messages, min_size=1, max_size=4))),
        sampling=draw(sampling_params()),
        limits=draw(pixel_limits(video=True)),
        add_generation_prompt=not continues and draw(st.booleans()),
        continue_final_message=continues,
        add_vision_id=draw(st.booleans()),
        cache_salt=draw(words),
    )


@settings(max_examples=80, deadline=None)
@given(request=chat_requests(), stream=st.booleans())
def test_chat_requests_survive_the_wire(request: ChatRequest, stream: bool) -> None:
    sent = json.dumps(wire.chat_body(request, "m", stream)).encode()
    call = wire.parse_chat(sent)
    assert (call.model, call.stream) == ("m", stream)
    assert call.request == request


@settings(max_examples=60, deadline=None)
@given(
    prompt=words | st.lists(token_ids, min_size=1, max_size=5).map(tuple),
    sampling=sampling_params(),
    stream=st.booleans(),
    echo=st.booleans(),
    salt=words,
)
def test_completion_requests_survive_the_wire(
    prompt: str | tuple[int, ...], sampling: SamplingParams, stream: bool, echo: bool, salt: str
) -> None:
    request = CompletionRequest(prompt, sampling, echo and sampling.logprobs is None, salt)
    call = wire.parse_completion(json.dumps(wire.completion_body(request, "m", stream)).encode())
    assert (call.model, call.requests, call.stream) == ("m", (request,), stream)


def test_only_what_was_asked_for_is_sent() -> None:
    """Other servers refuse or misread fields that they do not know: defaults stay home."""
    request = ChatRequest((Message("user", (TextPart("hi"),)),))
    assert wire.chat_body(request, "m", False) == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert wire.chat_body(request, "m", True)["stream"] is True


def test_pictures_in_memory_cannot_be_sent() -> None:
    request = ChatRequest((Message("user", (MediaPart("image", b"\x89PNG"),)),))
    with pytest.raises(InvalidRequest, match="bytes cannot travel"):
        wire.chat_body(request, "m", False)


logprobs = st.none() | st.lists(
    st.builds(
        TokenLogprob,
        st.integers(0, 200),
        st.floats(-9999, 0),
        st.lists(st.tuples(st.integers(0, 200), st.floats(-9999, 0)), max_size=3, unique_by=lambda top: top[0]).map(
            tuple
        ),
    ),
    min_size=1,
    max_size=3,
).map(tuple)
usages = st.builds(Usage, st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
reasons = st.sampled_from(["stop", "length", "abort", "error"])
stops = st.none() | st.integers(0, 10) | words
OPTIONS = wire.Options(include_usage=True, continuous_usage=True, token_ids=True, tokens_as_ids=True)
HEAD = wire.Head("id", "m", 1)
id_lists = st.lists(token_ids, max_size=3).map(tuple)
deltas = st.lists(
    st.builds(Delta, st.integers(0, 2), words, id_lists, logprobs, st.none(), st.none(), usages)
    | st.builds(Delta, st.integers(0, 2), words, st.just(()), logprobs, reasons, stops, usages),
    max_size=6,
)  # fmt: skip
answers = st.builds(Answer, st.integers(0, 63), words, st.lists(token_ids).map(tuple), reasons, stops, logprobs)


def name_of(token_id: int) -> bytes:
    return bytes([token_id])


@settings(max_examples=60, deadline=None)
@given(deltas=deltas)
def test_streams_survive_the_wire(deltas: list[Delta]) -> None:
    chat, text = wire.ChatWriter(HEAD, name_of, OPTIONS), wire.CompletionWriter(HEAD, name_of, OPTIONS)
    for delta in deltas:
        assert wire.read_chunk(json.loads(chat.chunk(delta))) == [delta]
        assert wire.read_completion_chunk(json.loads(text.chunk(delta))) == [delta]


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(answers, max_size=4, unique_by=lambda answer: answer.index), usage=usages)
def test_whole_answers_survive_the_wire(answers: list[Answer], usage: Usage) -> None:
    completion = Completion(tuple(sorted(answers, key=lambda answer: answer.index)), usage)
    sent = wire.ChatWriter(HEAD, name_of, OPTIONS).response(completion)
    assert wire.read_response(json.loads(sent)) == completion


def test_what_a_plain_server_leaves_out() -> None:
    """OpenAI's own chunks: no ids, no stop_reason, a closing chunk with an empty delta, usage alone at the end."""
    opening = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
    assert wire.read_chunk(opening) == [Delta(0, "")]
    closing = {"choices": [{"index": 1, "delta": {}, "finish_reason": "content_filter"}], "usage": None}
    assert wire.read_chunk(closing) == [Delta(1, "", finish_reason="stop")]
    counts = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}}
    assert wire.read_chunk(counts) == [Delta(0, "", usage=Usage(3, 2, 0))]
    assert wire.read_chunk({"choices": []}) == []
    named = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    chunk = {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [named]}}]}
    assert wire.read_chunk(chunk)[0].logprobs == (TokenLogprob(-1, -1.0),)


@pytest.mark.parametrize(
    "junk", [{}, {"choices": 5}, {"choices": [5]}, {"choices": [{}]}, {"choices": [{"delta": {}}]}]
)
def test_answers_that_are_not_understood(junk: dict[str, Any]) -> None:
    with pytest.raises(RequestFailed, match="not understood"):
        wire.read_chunk(junk)
    with pytest.raises(RequestFailed, match="not understood"):
        wire.read_response(junk)


ERRORS = [
    InvalidRequest("no", param="n"),
    PromptTooLong(10, 5, "use fewer"),
    TooManyMedia("image", 5, 4),
    BadMedia("broken"),
    ModelNotFound("x", ["y"]),
    Unauthorized("key"),
    Overloaded("full"),
    Unavailable("starting"),
    RequestFailed("nan"),
    QvlError("oops"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_survive_the_wire(error: QvlError) -> None:
    sent = json.dumps(wire.error_body(error)).encode()
    read = wire.read_error(error.status, sent, retry_after=7)
    assert (type(read), read.message, read.param) == (type(error), error.message, error.param)
    assert wire.error_body(read) == wire.error_body(error)
    assert not isinstance(read, Overloaded) or read.retry_after == 7
    with pytest.raises(type(error)):
        wire.read_chunk(json.loads(sent))
    with pytest.raises(type(error)):
        wire.read_response(json.loads(sent))


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (429, b'{"error": {"message": "slow", "code": "rate_limit"}}', Overloaded),
        (401, b'{"error": {"message": "key", "code": null}}', Unauthorized),
        (404, b'{"error": {"message": "no model"}}', ModelNotFound),
        (422, b'{"detail": "bad"}', InvalidRequest),
        (400, b'{"error": "text"}', InvalidRequest),
        (503, b"<html>gateway</html>", Unavailable),
        (502, b"", QvlError),
        (500, b'{"error": {"message": "x", "code": 500}}', QvlError),
        (500, b"\xff[1]", QvlError),
        (500, b"[1]", QvlError),
    ],
)
def test_errors_of_other_servers(status: int, body: bytes, kind: type[QvlError]) -> None:
    error = wire.read_error(status, body)
    assert type(error) is kind
    assert error.message
    assert str(status) in error.message or b'"message"' in body


def test_the_page_of_another_server_is_one_line() -> None:
    page = b"<!DOCTYPE html>\n<html lang='en'>\n  <body>\n    <h1>Not here</h1>\n    <p>Error\n 404</p></body></html>\n"
    assert wire.read_error(404, page).message == "the server answered 404: Not here Error 404"
