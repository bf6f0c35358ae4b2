"""EchoBackend keeps the rules of `Backend`, so that what is tested over it holds over others."""

from __future__ import annotations

import asyncio

import pytest

from qvl.backends.base import collect
from qvl.backends.echo import TOKENS_PER_MEDIUM, EchoBackend
from qvl.backends.merge import merge
from qvl.errors import InvalidRequest, PromptTooLong, Unavailable
from qvl.types import ChatRequest, CompletionRequest, MediaPart, Message, SamplingParams, TextPart, Usage


@pytest.fixture
async def echo() -> EchoBackend:
    backend = EchoBackend(max_model_len=100)
    await backend.start()
    return backend


def ask(text: str, **sampling: object) -> CompletionRequest:
    return CompletionRequest(text, SamplingParams(**sampling))  # type: ignore[arg-type]


async def test_repeats_the_last_user_text_and_counts_media(echo: EchoBackend) -> None:
    messages = (
        Message("user", (MediaPart("image", "x"), MediaPart("video", "y"), TextPart("first"))),
        Message("assistant", (TextPart("answer"),)),
        Message("user", (MediaPart("image", "z"), TextPart("sec"), TextPart("ond"))),
    )
    done = await collect(echo.chat(ChatRequest(messages), "r"))
    assert done.text == "second [2 images, 1 video]"
    assert done.usage.prompt_tokens == len("firstanswersecond") + 3 * TOKENS_PER_MEDIUM


@pytest.mark.parametrize(
    ("sampling", "text", "reason", "stop", "tokens"),
    [
        ({}, "abcdef", "stop", None, 6),
        ({"max_tokens": 6}, "abcdef", "stop", None, 6),
        ({"max_tokens": 4}, "abcd", "length", None, 4),
        ({"stop": ("de", "cd")}, "ab", "stop", "cd", 4),
        ({"stop": ("a",)}, "", "stop", "a", 1),
        ({"stop": ("cd",), "include_stop_str_in_output": True}, "abcd", "stop", "cd", 4),
        ({"stop": ("ef",), "max_tokens": 5}, "abcde", "length", None, 5),
        ({"stop": ("zz",)}, "abcdef", "stop", None, 6),
    ],
)
async def test_ends_as_it_is_told(
    echo: EchoBackend, sampling: dict[str, object], text: str, reason: str, stop: str | None, tokens: int
) -> None:
    deltas = [delta async for delta in echo.complete(ask("abcdef", **sampling), "r")]
    assert "".join(delta.text for delta in deltas) == text
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [reason]
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].usage == Usage(6, tokens)
    assert sum(len(delta.token_ids) for delta in deltas) == tokens


async def test_the_context_is_a_limit_for_both(echo: EchoBackend) -> None:
    with pytest.raises(PromptTooLong):
        await collect(echo.complete(ask("x" * 100), "r"))
    done = await collect(echo.complete(ask("x" * 60), "r"))
    assert (len(done.text), done.answers[0].finish_reason) == (40, "length")


async def test_stopping_ends_what_runs(echo: EchoBackend) -> None:
    stream = echo.complete(ask("abc"), "r")
    await anext(stream)
    await echo.stop()
    with pytest.raises(Unavailable):
        await anext(stream)
    assert echo.stats()["running"] == 0


async def test_several_prompts_become_one_stream(echo: EchoBackend) -> None:
    streams = [echo.complete(ask(text, n=2), "r") for text in ("ab", "cde", "")]
    done = await collect(merge(streams, 2))
    assert [answer.text for answer in done.answers] == ["ab", "ab", "cde", "cde", "", ""]
    assert done.usage == Usage(5, 10)


async def test_one_failure_ends_all_of_them(echo: EchoBackend) -> None:
    slow = EchoBackend(seconds_per_token=0.01)
    await slow.start()
    streams = [slow.complete(ask("x" * 500), "r"), echo.complete(ask("x" * 100), "r")]
    with pytest.raises(PromptTooLong):
        await collect(merge(streams, 1))
    assert (slow.stats()["running"], slow.stats()["aborted_total"]) == (0, 1)


async def test_closing_one_stream_closes_all(echo: EchoBackend) -> None:
    slow = EchoBackend(seconds_per_token=0.01)
    await slow.start()
    merged = merge([slow.complete(ask("x" * 500), "r") for _ in range(3)], 1)
    await anext(merged)
    await merged.aclose()
    await asyncio.sleep(0)
    assert slow.stats()["running"] == 0


async def test_a_conversation_has_as_many_tokens_as_its_answer_says(echo: EchoBackend) -> None:
    talk = ChatRequest((Message("user", (TextPart("look"), MediaPart("image", "data:,x"))),))
    used = [delta.usage async for delta in echo.chat(talk, "r")][-1].prompt_tokens
    assert len(await echo.tokenize(talk)) == used == 8
    with pytest.raises(PromptTooLong):
        await echo.tokenize(ChatRequest((Message("user", (TextPart("x" * 10_000),)),)))


async def test_tokens_there_and_back(echo: EchoBackend) -> None:
    tokens = await echo.tokenize(ask("añ🙂"))
    assert await echo.detokenize(tokens) == "añ🙂"
    for bad in (-1, 0xD800, 0x110000):
        with pytest.raises(InvalidRequest):
            await echo.detokenize([bad])
