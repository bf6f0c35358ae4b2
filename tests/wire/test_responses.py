"""Answers, judged by the official client's own models of the shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from qvl import wire
from qvl.errors import Overloaded, PromptTooLong, QvlError
from qvl.types import Answer, Completion, Delta, TokenLogprob, Usage

HEAD = wire.Head("chatcmpl-1", "served", 1_700_000_000)
USAGE = Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=8)
HALF = "😀".encode()[:2]
TOKENS = {1: b"Hel", 2: b"lo", 3: HALF, 4: b" \n"}


def token_bytes(token_id: int) -> bytes:
    return TOKENS[token_id]


def chat_writer(**options: bool) -> wire.ChatWriter:
    return wire.ChatWriter(HEAD, token_bytes, wire.Options(**options))


def completion_writer(**options: bool) -> wire.CompletionWriter:
    return wire.CompletionWriter(HEAD, token_bytes, wire.Options(**options))


LOGPROBS = (TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5))), TokenLogprob(3, float("-inf")))


def test_a_chat_completion() -> None:
    answers = (
        Answer(0, 'Hello "you"\n😀', (1, 2), "stop", "x"),
        Answer(1, "", (), "length", None, LOGPROBS),
    )
    raw = chat_writer().response(Completion(answers, USAGE))
    parsed = ChatCompletion.model_validate_json(raw, strict=True)
    assert (parsed.id, parsed.model, parsed.created) == ("chatcmpl-1", "served", 1_700_000_000)
    assert [choice.message.content for choice in parsed.choices] == ['Hello "you"\n😀', ""]
    assert [choice.finish_reason for choice in parsed.choices] == ["stop", "length"]
    assert json.loads(raw)["choices"][0]["stop_reason"] == "x"
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens, parsed.usage.total_tokens) == (10, 3, 13)
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 8
    content = parsed.choices[1].logprobs and parsed.choices[1].logprobs.content
    assert content
    assert (content[0].token, content[0].bytes, content[0].logprob) == ("Hel", list(b"Hel"), -0.5)
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("Hel", -0.5), ("lo", -1.5)]
    assert (content[1].token, content[1].bytes, content[1].logprob) == ("\ufffd", list(HALF), -9999.0)
    assert "token_ids" not in json.loads(raw)["choices"][0]


def test_chunks_of_two_answers() -> None:
    writer = chat_writer()
    deltas = [
        Delta(0, "He", (1,)),
        Delta(1, "Oh", (2,), LOGPROBS),
        Delta(0, "llo", (2,), finish_reason="stop", stop_reason=7),
        Delta(1, "", (), None, "length"),
    ]
    raws = [writer.chunk(delta) for delta in deltas]
    chunks = [ChatCompletionChunk.model_validate_json(raw, strict=True) for raw in raws]
    assert [chunk.choices[0].index for chunk in chunks] == [0, 1, 0, 1]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", "assistant", None, None]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["He", "Oh", "llo", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop", "length"]
    assert json.loads(raws[2])["choices"][0]["stop_reason"] == 7
    assert chunks[1].choices[0].logprobs is not None
    assert chunks[0].choices[0].logprobs is None
    assert all(b"\n" not in raw for raw in raws)  # an event is one line
    assert all("usage" not in json.loads(raw) for raw in raws)


def test_usage_in_streams() -> None:
    delta = Delta(0, "x", usage=USAGE)
    assert json.loads(chat_writer(include_usage=True).chunk(delta))["usage"] is None
    continuous = json.loads(chat_writer(include_usage=True, continuous_usage=True).chunk(delta))
    assert continuous["usage"]["total_tokens"] == 13
    for writer, kind in ((chat_writer(), "chat.completion.chunk"), (completion_writer(), "text_completion")):
        last = json.loads(writer.usage_chunk(USAGE))
        assert (last["choices"], last["object"], last["usage"]["prompt_tokens"]) == ([], kind, 10)


def test_token_ids_on_request() -> None:
    delta = Delta(0, "x", (1, 2), (TokenLogprob(1, -1.0, ((2, -2.0),)),))
    choice = json.loads(chat_writer(token_ids=True, tokens_as_ids=True).chunk(delta))["choices"][0]
    assert choice["token_ids"] == [1, 2]
    entry = choice["logprobs"]["content"][0]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("token_id:1", "token_id:2")
    choice = json.loads(completion_writer(token_ids=True, tokens_as_ids=True).chunk(delta))["choices"][0]
    assert (choice["token_ids"], choice["logprobs"]["tokens"]) == ([1, 2], ["token_id:1"])


def test_a_text_completion_of_two_prompts() -> None:
    first = Completion((Answer(0, "a", (1,), "stop", None, LOGPROBS), Answer(1, "b", (2,), "length")), Usage(1, 2, 1))
    second = Completion((Answer(0, "c", (1,), "stop"), Answer(1, "d", (2,), "stop")), Usage(3, 4, 0))
    parsed = OpenAICompletion.model_validate_json(completion_writer().response([first, second]), strict=True)
    assert [(choice.index, choice.text) for choice in parsed.choices] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (4, 6)
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs) == (["Hel", "\ufffd"], [-0.5, -9999.0])
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"Hel": -0.5, "lo": -1.5}


def test_text_offsets_go_on_from_chunk_to_chunk() -> None:
    writer = completion_writer()
    offsets = []
    for index, token in ((0, 1), (1, 2), (0, 2), (0, 4), (1, 1)):
        chunk = json.loads(writer.chunk(Delta(index, "", (token,), (TokenLogprob(token, -1.0),))))
        offsets.append((index, chunk["choices"][0]["logprobs"]["text_offset"]))
    assert offsets == [(0, [0]), (1, [0]), (0, [3]), (0, [5]), (1, [2])]


@pytest.mark.parametrize("text", ["\u2028\u2029\x85", "\x00\x1f", "<|im_end|>", "\\", '"', "\ufffd", "👩‍👩‍👧"])
def test_any_text_survives_json(text: str) -> None:
    raw = chat_writer().chunk(Delta(0, text))
    assert json.loads(raw)["choices"][0]["delta"]["content"] == text
    assert b"\n" not in raw
    assert b"\r" not in raw


def test_model_list() -> None:
    body: dict[str, Any] = wire.model_list(["main", "alias"], created=5, max_model_len=4096)
    models = [Model.model_validate(entry) for entry in body["data"]]
    assert [(model.id, model.created, model.object) for model in models] == [
        ("main", 5, "model"),
        ("alias", 5, "model"),
    ]
    assert [entry["max_model_len"] for entry in body["data"]] == [4096, 4096]
    assert [entry["root"] for entry in body["data"]] == ["main", "main"]


def test_token_bodies() -> None:
    plain = wire.tokenize_response([1, 3], max_model_len=99)
    assert plain == {"count": 2, "max_model_len": 99, "tokens": [1, 3], "token_strs": None}
    named = wire.tokenize_response([1, 3], max_model_len=99, token_bytes=token_bytes)
    assert named["token_strs"] == ["Hel", "\ufffd"]
    assert wire.detokenize_response("x") == {"prompt": "x"}


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (PromptTooLong(10, 5), "invalid_request_error", "context_length_exceeded"),
        (Overloaded("full"), "rate_limit_error", "server_overloaded"),
        (QvlError("x"), "server_error", "internal_error"),
    ],
)
def test_error_bodies(error: QvlError, kind: str, code: str) -> None:
    body = wire.error_body(error)["error"]
    assert body == {"message": error.message, "type": kind, "code": code, "param": error.param}


@pytest.mark.parametrize("options", [wire.Options(), wire.Options(include_usage=True)])
def test_the_short_way_to_a_chunk_writes_the_same(options: wire.Options) -> None:
    """Chunks of nothing but text are put together from bytes; with log-probabilities the long way writes them."""
    texts = ["plain", 'quo"te\\', "line\nbreak", "日本 🙂", "\ue000", "", "}]}"]
    for writer_of in (wire.ChatWriter, wire.CompletionWriter):
        writer = writer_of(wire.Head("id", 'na"me', 7), lambda _: b"x", options)
        for index in (0, 1, 0):
            for text in texts:
                short = json.loads(writer.chunk(Delta(index, text)))
                long = json.loads(writer.chunk(Delta(index, text, logprobs=())))
                assert long["choices"][0].pop("logprobs") is not None
                assert short["choices"][0].pop("logprobs") is None
                long["choices"][0].get("delta", {}).pop("role", None)
                short["choices"][0].get("delta", {}).pop("role", None)
                assert short == long
                assert (
                    short["choices"][0].get("text") or short["choices"][0].get("delta", {}).get("content", "")
                ) == text


def test_a_probability_that_is_no_number_is_still_json() -> None:
    entries = (TokenLogprob(1, float("nan"), ((2, float("-inf")),)),)
    answer = Answer(0, "Hel", (1,), "stop", logprobs=entries)
    told = json.loads(chat_writer().response(Completion((answer,), USAGE)))["choices"][0]["logprobs"]["content"][0]
    assert (told["logprob"], told["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


def test_what_was_dropped_is_told_once_in_a_stream_of_several_answers() -> None:
    writer = wire.ChatWriter(HEAD, token_bytes, overflowed=wire.Overflowed("window", dropped_messages=2))
    chunks = [json.loads(writer.chunk(Delta(index, "x"))) for index in (0, 1, 0, 1)]
    assert ["qvl" in chunk for chunk in chunks] == [True, False, False, False]
    assert chunks[0]["qvl"]["dropped_messages"] == 2
