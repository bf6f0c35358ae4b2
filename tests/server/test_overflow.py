"""Conversations that are too long for the model, through a real server: what leaves, what stays, what is told."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
from collections.abc import AsyncGenerator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from PIL import Image

from qvl.backends.echo import EchoBackend
from qvl.errors import ConfigError, RequestFailed
from qvl.media.load import Once
from qvl.server.counts import Counts
from qvl.server.options import ServerOptions
from qvl.server.service import Service
from qvl.types import ChatRequest, Delta, Message, Usage
from qvl.wire import Overflowed, parse_chat
from tests.backends.conftest import made
from tests.memory.scripted import is_summary, media_of, text_of
from tests.server.live import Live, live, wait_until
from tests.server.test_metrics import numbers
from tests.server.test_processes import running

CHAT = "/v1/chat/completions"
CONTEXT = 600  # characters are tokens: 150 are kept for the answer, 450 are room
WIDE = 3000  # where the request for a summary has room too; 512 and 2,488


class Teller(EchoBackend):
    """Echoes, one token per character, and remembers what it was asked; summaries are what `summary` says."""

    def __init__(self, context: int) -> None:
        super().__init__(max_model_len=context)
        self.requests: list[tuple[Message, ...]] = []
        self.summaries: list[ChatRequest] = []
        self.summary: str | Exception = "They counted."
        self.hangs = False
        self.left = 0
        self.loads = False

    async def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:  # type: ignore[override]
        if not is_summary(request.messages):
            self.requests.append(request.messages)
            async for delta in super().chat(request, request_id):
                yield delta
            return
        self.summaries.append(request)
        for source in media_of(request.messages) if self.loads else ():
            source.loaded = "pixels"  # type: ignore[attr-defined]
        try:
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.left += self.hangs
        if isinstance(self.summary, Exception):
            raise self.summary
        yield Delta(0, self.summary, finish_reason="stop", usage=Usage(100, 10))


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def talk(exchanges: int, last: str = "and now?") -> list[dict[str, Any]]:
    """Exchanges of 50 characters after a system message of 10, and a question."""
    messages = [turn("system", "Be polite.")]
    for i in range(exchanges):
        messages += [turn("user", f"question {i:3}".ljust(30, ".")), turn("assistant", f"answer {i:3}".ljust(20, "."))]
    return [*messages, turn("user", last)]


@pytest.fixture
def teller() -> Teller:
    return Teller(CONTEXT)


@pytest.fixture
def server(teller: Teller) -> Iterator[Live]:
    with live(teller, ServerOptions(overflow="window")) as serving:
        yield serving


def test_the_oldest_turns_leave_and_the_answer_says_so(server: Live, teller: Teller) -> None:
    reply = server.post(CHAT, {"messages": talk(20)})
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["choices"][0]["message"]["content"] == "and now?"
    (sent,) = teller.requests
    assert [text_of(message)[:12] for message in sent][:2] == ["Be polite.", "question  14"]
    assert [message.role for message in sent] == ["system", *("user", "assistant") * 6, "user"]
    assert answer["usage"]["prompt_tokens"] == 10 + 6 * 50 + 8
    assert answer["qvl"] == {
        "overflow": "window",
        "dropped_messages": 28,
        "dropped_media": 0,
        "summarised_messages": 0,
        "summarised_media": 0,
        "summary": None,
        "summary_error": None,
    }
    seen = numbers(server)
    assert seen["qvl_overflowed_requests_total{strategy=window}"] == 1
    assert seen["qvl_overflowed_messages_total{as=dropped}"] == 28


def test_a_growing_conversation_begins_alike_for_several_turns(server: Live, teller: Teller) -> None:
    """So that its beginning is found in the prefix cache: more leaves at a time, and then nothing for a while."""
    messages = talk(20, "question  20")
    for i in range(21, 45):
        answer = server.post(CHAT, {"messages": messages}).json()
        messages += [turn("assistant", answer["choices"][0]["message"]["content"]), turn("user", f"question {i:3}")]
    firsts = [text_of(request[1]) for request in teller.requests]
    assert len(set(firsts)) <= 8
    assert firsts == sorted(firsts), "what has left does not come back"
    assert all(len(request) >= 2 + 2 * 4 for request in teller.requests)


def test_what_fits_is_sent_as_it_is(server: Live, teller: Teller) -> None:
    answer = server.post(CHAT, {"messages": talk(8)}).json()
    assert "qvl" not in answer
    assert len(teller.requests[0]) == 18
    assert not any(name.startswith("qvl_overflowed_requests_total") for name in numbers(server))


@pytest.mark.parametrize("n", [1, 3])
def test_the_first_chunk_of_a_stream_says_it(server: Live, n: int) -> None:
    body = {"messages": talk(20), "stream": True, "n": n, "stream_options": {"include_usage": True}}
    events = server.post(CHAT, body).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [("qvl" in chunk) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert chunks[0]["qvl"]["dropped_messages"] == 28
    texts = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == ["and now?"] * n


@pytest.mark.parametrize("stream", [False, True])
def test_openai_clients_do_not_mind(server: Live, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        made: Any = client.chat.completions.create(model="echo", messages=talk(20), stream=stream)  # type: ignore[call-overload]
        chunks = list(made) if stream else [made]
    assert chunks[0].model_extra["qvl"]["dropped_messages"] == 28
    assert "qvl" not in chunks[-1].model_extra or not stream


def test_a_request_chooses_for_itself(server: Live, teller: Teller) -> None:
    reply = server.post(CHAT, {"messages": talk(20), "overflow": "error"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    answer = server.post(CHAT, {"messages": talk(20), "overflow": "summary"}).json()
    assert answer["qvl"]["overflow"] == "summary"
    reply = server.post(CHAT, {"messages": talk(20), "overflow": "middle"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "overflow")
    reply = server.post("/v1/completions", {"prompt": "x" * 700, "overflow": "window"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "overflow")


def test_by_default_it_is_an_error() -> None:
    with live(EchoBackend(max_model_len=CONTEXT)) as plain:
        assert plain.post(CHAT, {"messages": talk(20)}).json()["error"]["code"] == "context_length_exceeded"
        assert "qvl" in plain.post(CHAT, {"messages": talk(20), "overflow": "window"}).json()


def test_a_last_message_that_is_too_long_is_still_an_error(server: Live) -> None:
    error = server.post(CHAT, {"messages": talk(3, "w" * 700)}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "has 710 tokens" in error["message"]
    assert "newest turn" in error["message"]


def test_a_last_message_that_leaves_less_for_the_answer_goes_alone(server: Live, teller: Teller) -> None:
    answer = server.post(CHAT, {"messages": talk(3, "w" * 580)}).json()
    assert len(teller.requests[0]) == 2
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["qvl"]["dropped_messages"] == 6
    alone = server.post(CHAT, {"messages": talk(0, "w" * 580)}).json()
    assert "qvl" not in alone


@pytest.mark.parametrize(("wish", "kept"), [(20, 8), (290, 4), (10**6, 4)])
def test_room_is_kept_for_the_answer_that_is_asked_for(server: Live, teller: Teller, wish: int, kept: int) -> None:
    reply = server.post(CHAT, {"messages": talk(20), "max_tokens": wish})
    assert reply.status_code == 200, reply.text
    assert len(teller.requests[0]) == 2 + 2 * kept
    assert reply.json()["usage"]["prompt_tokens"] == 18 + 50 * kept <= CONTEXT - min(wish, CONTEXT // 2)


def test_a_context_too_small_to_divide_says_no_by_itself() -> None:
    with live(EchoBackend(max_model_len=100), ServerOptions(overflow="summary")) as small:
        assert small.post(CHAT, {"messages": talk(20)}).json()["error"]["code"] == "context_length_exceeded"
        assert small.post(CHAT, {"messages": [turn("user", "hi")]}).status_code == 200


def test_what_else_is_wrong_is_said_as_ever(server: Live) -> None:
    for body in ({"messages": []}, {"messages": talk(20), "temperature": -1}, {"messages": talk(20), "model": "no"}):
        assert 400 <= server.post(CHAT, body).status_code < 500


# Summaries


@pytest.fixture
def wide() -> Teller:
    return Teller(WIDE)


@pytest.fixture
def summing(wide: Teller) -> Iterator[Live]:
    with live(wide, ServerOptions(overflow="summary")) as serving:
        yield serving


def grow(server: Live, turns: int, first: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A conversation that goes on as long as its answers come; the last answer."""
    messages, answer = list(first), {}
    for i in range(turns):
        messages.append(turn("user", f"question {i:3}".ljust(30, ".")))
        reply = server.post(CHAT, {"messages": messages, **more})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        messages.append(turn("assistant", answer["choices"][0]["message"]["content"]))
    return answer


def test_a_growing_conversation_is_not_summarised_anew_each_turn(summing: Live, wide: Teller) -> None:
    answer = grow(summing, 120, [turn("system", "Be polite.")])
    assert 3 <= len(wide.summaries) <= 12
    told = answer["qvl"]
    assert told["summary"] == "They counted."
    assert told["summarised_messages"] + len(wide.requests[-1]) - 2 == 238
    assert told["dropped_messages"] == 0
    assert text_of(wide.requests[-1][0]) == "Be polite."
    assert text_of(wide.requests[-1][1]).startswith("[Summary of the conversation so far]\nThey counted.")
    for earlier, later in zip(wide.summaries, wide.summaries[1:], strict=False):
        assert text_of(later.messages[1]).startswith("Summary so far:\nThey counted.")
        assert text_of(earlier.messages[1]) != text_of(later.messages[1])
    seen = numbers(summing)
    assert seen["qvl_summary_seconds_count{outcome=ok}"] == len(wide.summaries)
    assert seen["qvl_overflowed_messages_total{as=summarised}"] > 0
    calls = len(wide.summaries)
    assert summing.post(CHAT, {"messages": talk(5)}).status_code == 200
    assert len(wide.summaries) == calls, "another conversation that fits"


def test_a_summary_made_in_one_process_is_found_in_another(tmp_path: Path) -> None:
    """Two apps with nothing in common but the file, as two HTTP processes of one server."""

    async def talk_to(teller: Teller, exchanges: int, salt: str = "") -> Overflowed:
        overflow = Service(teller, ServerOptions(), Counts(), tmp_path / "summaries").overflow
        request = parse_chat({"messages": talk(exchanges), "cache_salt": salt}).request
        told = (await overflow.fit(request, "summary", "id")).told
        assert told is not None
        return told

    one, other = Teller(WIDE), Teller(WIDE)
    made = asyncio.run(talk_to(one, 60))
    assert one.summaries and made.summary == "They counted."
    assert asyncio.run(talk_to(other, 61)).summary == "They counted."
    assert other.summaries == []
    asyncio.run(talk_to(other, 61, salt="somebody else"))
    assert other.summaries != []


def test_a_clock_in_the_system_message_does_not_hide_the_summary(summing: Live, wide: Teller) -> None:
    for minute in range(3):
        messages = [turn("system", f"It is 12:{minute:02}."), *talk(60)[1:]]
        assert summing.post(CHAT, {"messages": messages}).json()["qvl"]["summary"]
    assert len(wide.summaries) == 2, "one conversation is folded once, in two calls"


def test_other_pasts_salts_and_pictures_are_other_conversations(summing: Live, wide: Teller) -> None:
    def calls(messages: list[dict[str, Any]], **more: Any) -> int:
        before = len(wide.summaries)
        assert summing.post(CHAT, {"messages": messages, **more}).status_code == 200
        return len(wide.summaries) - before

    assert calls(talk(60)) > 0
    assert calls(talk(60)) == 0
    assert calls(talk(60), cache_salt="somebody else") > 0
    other = talk(60)
    other[1] = turn("user", "question of another talk")
    assert calls(other) > 0
    shown = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,a"}}]
    changed = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,b"}}]
    other[1] = {"role": "user", "content": shown}
    assert calls(other) > 0
    assert calls(other) == 0
    other[1] = {"role": "user", "content": changed}
    assert calls(other) > 0


def test_a_failing_summary_falls_back_to_the_window_and_says_so(summing: Live, wide: Teller) -> None:
    wide.summary = RequestFailed("scores are not numbers")
    answer = grow(summing, 20, talk(40)[:-1])
    told = answer["qvl"]
    assert told["summary"] is None
    assert "not numbers" in told["summary_error"]
    assert told["dropped_messages"] > 0
    assert numbers(summing)["qvl_summary_seconds_count{outcome=failed}"] == len(wide.summaries)
    wide.summary = "w" * 500
    answer = grow(summing, 20, talk(41)[:-1])
    assert "over-long" in answer["qvl"]["summary_error"]


def test_a_slow_summary_is_given_up(wide: Teller) -> None:
    """On a slow machine the time may be up before the summary has begun: then with more of it."""
    wide.hangs = True
    for seconds in (0.2, 2.0, 20.0):
        with live(wide, ServerOptions(overflow="summary", summary_seconds=seconds)) as slow:
            told = slow.post(CHAT, {"messages": talk(60)}).json()["qvl"]
        assert f"longer than {seconds:g} s" in told["summary_error"]
        assert told["dropped_messages"] == 46
        if wide.summaries:
            break
    assert wide.left == len(wide.summaries) == 1, "its work was ended too"


def test_pictures_that_went_into_a_summary_are_given_back(summing: Live, wide: Teller) -> None:
    """Their pixels would be held until the answer has ended, for nothing."""
    messages = talk(60)
    messages[1] = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}
    wide.loads = True
    assert summing.post(CHAT, {"messages": messages}).json()["qvl"]["summarised_media"] == 1
    (shown,) = [source for request in wide.summaries for source in media_of(request.messages)]
    assert isinstance(shown, Once)
    assert shown.loaded is None


def test_a_client_that_leaves_ends_the_summary(summing: Live, wide: Teller) -> None:
    wide.hangs = True
    connection = http.client.HTTPConnection("127.0.0.1", summing.port)
    connection.request("POST", CHAT, json.dumps({"messages": talk(60)}))
    wait_until(lambda: len(wide.summaries) == 1, "no summary was asked for", 60)
    connection.close()
    wait_until(lambda: wide.left == 1, "the summary goes on for nobody", 60)


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="overflow"):
        ServerOptions(overflow="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="summary_seconds"):
        ServerOptions(summary_seconds=0)


# A real tokenizer, template and real pictures; only the model is not there


@cache
def png(number: int) -> str:
    """A picture of its own for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (60 + number * 13 % 90, 56 + number * 7 % 60), (number, 255 - number, 99)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown(number: int) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": png(number)}}, {"type": "text", "text": f"picture {number}?"}]
    return {"role": "user", "content": parts}


def picture_talk(turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [turn("system", "You look.")]
    for number in range(turns):
        messages += [shown(number), turn("assistant", f"This was number {number}. " * 4)]
    return [*messages, shown(turns)]


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Iterator[Live]:
    backend = made(checkpoint, "fast", max_model_len=512, limit_mm_per_prompt={"image": 12})
    with live(backend, ServerOptions(overflow="window")) as serving:
        yield serving


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"add_vision_id": True},
        {"mm_processor_kwargs": {"max_pixels": 3136}},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
@pytest.mark.parametrize("turns", [8, 30])
def test_pictures_are_counted_exactly(local: Live, turns: int, more: dict[str, Any]) -> None:
    """8 are too long, 30 also too many; the prompt that is sent is as long as what `/tokenize` says of it."""
    reply = local.post(CHAT, {"messages": picture_talk(turns), "max_tokens": 32, **more})
    assert reply.status_code == 200, reply.text
    chunks = [json.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]] if "stream" in more else [reply.json()]
    told, used = chunks[0]["qvl"], chunks[-1]["usage"]["prompt_tokens"]
    assert used <= 512 - 32
    left = told["dropped_messages"]
    assert (left % 2, told["dropped_media"]) == (0, left // 2)
    messages = picture_talk(turns)
    same = {name: value for name, value in more.items() if "stream" not in name}
    kept = [messages[0], *messages[1 + left :]]
    assert local.post("/tokenize", {"messages": kept, **same}).json()["count"] == used
    longer = local.post("/tokenize", {"messages": [messages[0], *messages[left - 1 :]], **same}).json()
    assert "error" in longer or longer["count"] > (512 - 32) * 3 // 4, "more left than a quarter of the room"


def test_an_answer_to_be_continued_stays(local: Live) -> None:
    messages = [*picture_talk(30), turn("assistant", "This is")]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 8}
    reply = local.post(CHAT, body)
    assert reply.status_code == 200, reply.text
    kept = [messages[0], *messages[1 + reply.json()["qvl"]["dropped_messages"] :]]
    counted = local.post("/tokenize", {"messages": kept, "continue_final_message": True}).json()["count"]
    assert reply.json()["usage"]["prompt_tokens"] == counted


def test_a_picture_is_read_once_however_often_it_is_counted(checkpoint: Path) -> None:
    """Of 30, those in the request and one exchange beyond it: nobody decodes what cannot fit anyway."""
    backend = made(checkpoint, "fast", max_model_len=512)
    with live(backend, ServerOptions(overflow="window")) as serving:
        told = serving.post(CHAT, {"messages": picture_talk(30), "max_tokens": 8}).json()["qvl"]
        seen = numbers(serving)
    sent = 31 - told["dropped_media"]
    assert sent == 4, "the default limit"
    decoded = seen["qvl_media_stage_seconds_count{kind=image,stage=decode}"]
    assert sent <= decoded <= 12
    assert seen["qvl_media_stage_seconds_count{kind=image,stage=share}"] == sent


def test_a_conversation_known_as_long_is_not_counted_whole_again(checkpoint: Path) -> None:
    backend = made(checkpoint, "fast", max_model_len=512, limit_mm_per_prompt={"image": 99})
    with live(backend, ServerOptions(overflow="window")) as serving:

        def decoded(turns: int) -> float:
            assert serving.post(CHAT, {"messages": picture_talk(turns), "max_tokens": 8}).status_code == 200
            return numbers(serving)["qvl_media_stage_seconds_count{kind=image,stage=decode}"]

        first = decoded(30)
        assert decoded(31) - first <= 12 < first


def test_a_summary_is_not_used_where_all_of_it_fits(summing: Live, wide: Teller) -> None:
    """Less is asked for the answer: what was too long a moment ago fits."""
    assert "qvl" in summing.post(CHAT, {"messages": talk(52)}).json()
    assert "qvl" not in summing.post(CHAT, {"messages": talk(52), "max_tokens": 16}).json()
    assert len(wide.requests[-1]) == 106


def test_broken_pictures(local: Live) -> None:
    """In the newest turn an error as ever; in a turn that is too old to matter nothing."""
    bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    newest = picture_talk(30)
    newest[-1] = {"role": "user", "content": [bad]}
    assert local.post(CHAT, {"messages": newest}).json()["error"]["code"] == "invalid_media"
    oldest = picture_talk(30)
    oldest[1] = {"role": "user", "content": [bad]}
    assert local.post(CHAT, {"messages": oldest, "max_tokens": 8}).status_code == 200


def test_several_http_processes(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, options='{"overflow": "window"}') as server:
        for _ in range(6):  # each over a connection of its own
            reply = requests.post(server.url + CHAT, json={"messages": picture_talk(30), "max_tokens": 8}, timeout=60)
            assert reply.status_code == 200, reply.text
            assert reply.json()["qvl"]["dropped_messages"] >= 50
        assert server.metric('qvl_overflowed_requests_total{strategy="window"}') == 6


def test_several_http_processes_share_summaries(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, "brief", '{"overflow": "summary"}') as server:
        calls = []
        for _ in range(8):  # each over a connection of its own, to whichever process takes it
            reply = requests.post(server.url + CHAT, json={"messages": talk(18), "max_tokens": 8}, timeout=60)
            assert reply.status_code == 200, reply.text
            assert reply.json()["qvl"]["summary"], reply.json()["qvl"]["summary_error"]
            calls.append(server.metric('qvl_summary_seconds_count{outcome="ok"}'))
        assert calls[0] > 0 and set(calls) == {calls[0]}
