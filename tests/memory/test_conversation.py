"""Conversations over a store: 200 turns under 2,048 tokens, crashes, both faces, and a server of the real thing."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl.client import Client
from qvl.engine.config import DeviceFacts, EngineOptions, resolve
from qvl.errors import BadMedia, ConfigError, InvalidRequest, PromptTooLong, RequestFailed, Unavailable
from qvl.memory import (
    AsyncConversation,
    Budget,
    Conversation,
    LocalCounter,
    Reply,
    ServerCounter,
    Store,
    Strategy,
)
from qvl.memory.steps import Messages
from qvl.tokenizer import Tokenizer
from qvl.types import Completion, Delta, SamplingParams, Usage
from tests.backends.conftest import made
from tests.memory.scripted import Model, completion, is_summary, media_of, said, text_of, words_counted
from tests.server.live import Live, live

ROOT = Path(__file__).resolve().parents[2]
FACTS = DeviceFacts("cpu", (0, 0), 8 << 30, "float32", 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "talk.db") as opened:
        yield opened


@cache
def png(number: int) -> bytes:
    """A picture of its own for every number, of changing size."""
    height, width = 40 + number * 7 % 200, 40 + number * 13 % 240
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number, 255 - number, 99)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def counter(checkpoint: Path) -> LocalCounter:
    """Counts as an engine of the tiny checkpoint does."""
    config = resolve(EngineOptions.from_dict({"model": str(checkpoint), "max_model_len": 2048}), FACTS)
    return LocalCounter(config, Tokenizer.from_folder(config.spec.folder, config.spec.ids))


@pytest.mark.parametrize("strategy", ["summary", "window"])
def test_200_turns_with_pictures_in_2048_tokens(store: Store, counter: LocalCounter, strategy: Strategy) -> None:
    """No request above the budget, the last picture always in it, nothing lost from the store."""
    model = Model(2048, counter, summarise=lambda messages: completion(f"{len(model.summaries)} pictures were shown."))
    model.answer = lambda messages: f"I see {len(media_of(messages))} pictures. " + "More words follow. " * 8
    talk = Conversation(store, model.ask, counter, 2048, strategy, system="You describe pictures.")
    for i in range(200):
        reply = talk.send(f"Look at picture number {i}. " + "What is on it? " * (1 + i % 9), png(i))
        sent = model.requests[-1]
        assert media_of(sent)[-1] == png(i)
        assert text_of(sent[-1]).startswith(f"Look at picture number {i}.")
        assert text_of(sent[0]) == "You describe pictures."
        assert reply.prompt_tokens == counter(sent) <= talk.budget.room
    assert len(model.requests) == 200
    turns = talk.turns
    assert [turn.number for turn in turns] == list(range(401))
    shown = [store.resolve(turn.message) for turn in turns if turn.message.role == "user"]
    assert media_of(shown) == [png(i) for i in range(200)]
    assert ("dropped" in {notice.kind for notice in reply.notices}) == (strategy == "window")
    summaries = store.summaries(talk.id)
    assert bool(summaries) == (strategy == "summary")
    if summaries:
        assert 10 < len(model.summaries) < 110, "not a call to the model for every turn"
        assert text_of(model.requests[-1][1]).count(summaries[-1].text) == 1
        folded = [source for request in model.summaries for source in media_of(request)]
        assert folded == [png(i) for i in range(len(folded))], "every picture is seen once before it leaves"


# One body through both faces


class Face:
    """`Conversation` or `AsyncConversation`, driven the same way."""

    def __init__(self, kind: str, store: Store, scripted: Model, **more: Any) -> None:
        self.model = model = scripted
        if kind == "sync":
            self.talk: Any = Conversation(
                store, model.ask, model.count, 1000, stream=lambda m, s: iter(pieces(model.ask(m, s))), **more
            )
        else:
            self.talk = AsyncConversation(
                store, later(model.ask), later(model.count), 1000, stream=self._stream, **more
            )

    async def _stream(self, messages: Messages, sampling: SamplingParams) -> AsyncIterator[Delta]:
        for delta in pieces(self.model.ask(messages, sampling)):
            await asyncio.sleep(0)
            yield delta

    async def send(self, *args: Any, **more: Any) -> Reply:
        made = self.talk.send(*args, **more)
        return made if isinstance(made, Reply) else await made  # type: ignore[no-any-return]

    async def retry(self) -> Reply:
        made = self.talk.retry()
        return made if isinstance(made, Reply) else await made  # type: ignore[no-any-return]

    async def stream(self, *args: Any, stop_after: int | None = None) -> str:
        stream, text = self.talk.stream(*args), ""
        if isinstance(self.talk, Conversation):
            for number, delta in enumerate(stream):
                text += delta.text
                if number + 1 == stop_after:
                    stream.close()
                    break
            return text
        number = 0
        async for delta in stream:
            text += delta.text
            number += 1
            if number == stop_after:
                await stream.aclose()
                break
        return text


def later(call: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def awaited(*args: Any) -> Any:
        await asyncio.sleep(0)
        return call(*args)

    return awaited


def pieces(whole: Completion) -> list[Delta]:
    words = whole.text.split(" ")
    deltas = [Delta(0, word + " " * (i + 1 < len(words)), usage=Usage(7, i + 1)) for i, word in enumerate(words)]
    return [*deltas, Delta(0, "", finish_reason="stop", usage=whole.usage)]


faces = pytest.mark.parametrize("kind", ["sync", "async"])


@faces
async def test_a_conversation_is_kept_found_and_gone_on_with(store: Store, kind: str) -> None:
    face = Face(kind, store, Model(1000), system="Be brief.", name="trip", model="tiny")
    reply = await face.send("Where is Beijing?")
    assert reply.text == "answer to Where is Beijing?"
    assert reply.turn.usage == reply.completion.usage
    assert (reply.turn.model, reply.turn.finish_reason) == ("tiny", "stop")
    assert face.talk.last is reply
    await face.send("And Shanghai?")
    again = Face(kind, store, Model(1000), id="trip")
    await again.send("Both?")
    (sent,) = again.model.requests
    assert [text_of(message) for message in sent] == [
        "Be brief.",
        "Where is Beijing?",
        "answer to Where is Beijing?",
        "And Shanghai?",
        "answer to And Shanghai?",
        "Both?",
    ]
    assert [info.title for info in store.conversations()] == ["trip"]
    assert store.search("shanghai")[0].conversation_id == again.talk.id
    again.talk.rename("china")
    assert again.talk.undo() == 2
    assert len(again.talk.turns) == 5
    with pytest.raises(InvalidRequest):
        Face(kind, store, Model(1000), id="trip")


@faces
async def test_streams_are_recorded_when_they_end(store: Store, kind: str) -> None:
    model = Model(1000, answer=lambda messages: "one two three four")
    face = Face(kind, store, model)
    assert await face.stream("count") == "one two three four"
    assert face.talk.last.text == "one two three four"
    assert face.talk.last.turn.finish_reason == "stop"
    assert text_of(face.talk.turns[-1].message) == "one two three four"


@faces
async def test_leaving_a_stream_keeps_what_was_said(store: Store, kind: str) -> None:
    face = Face(kind, store, Model(1000, answer=lambda messages: "one two three four"))
    assert await face.stream("count", stop_after=2) == "one two "
    last = face.talk.turns[-1]
    assert (text_of(last.message), last.finish_reason) == ("one two ", "abort")
    assert last.usage == Usage(7, 2)
    await face.send("go on")
    assert [text_of(message) for message in face.model.requests[-1]] == ["count", "one two ", "go on"]


@faces
async def test_a_failed_answer_leaves_the_question_and_can_be_asked_again(store: Store, kind: str) -> None:
    def fail(messages: Messages) -> str:
        raise Unavailable("restarting")

    face = Face(kind, store, Model(1000, answer=fail))
    for attempt in (face.send("Hello?", png(1)), face.stream("Anybody?")):
        with pytest.raises(Unavailable):
            await attempt
    assert [turn.message.role for turn in face.talk.turns] == ["user", "user"]
    assert face.talk.unanswered
    face.model.answer = lambda messages: "here"
    assert (await face.retry()).text == "here"
    assert media_of(face.model.requests[-1]) == [png(1)]
    assert not face.talk.unanswered
    with pytest.raises(InvalidRequest, match="has its answer"):
        await face.retry()


@faces
async def test_a_turn_that_cannot_be_sent_is_not_kept(store: Store, kind: str, tmp_path: Path) -> None:
    def count(messages: Messages) -> int:
        if b"broken" in media_of(messages):
            raise BadMedia("no picture")
        return words_counted(messages)

    face = Face(kind, store, Model(1000, count))
    await face.send("fine")
    for bad, error in (
        (("w " * 5000,), PromptTooLong),
        (("what?", b"broken"), BadMedia),
        (("what?", tmp_path / "nowhere.png"), InvalidRequest),
        ((said("I am the system", "system"),), InvalidRequest),
    ):
        with pytest.raises(error):
            await face.send(*bad)
    with pytest.raises(InvalidRequest, match="'n' must be 1"):
        await face.send("two answers", sampling=SamplingParams(n=2))
    assert len(face.talk.turns) == 2
    assert (await face.send("fine again")).notices == ()


@faces
async def test_a_failing_summary_is_told_by_turn_numbers_and_loses_nothing(store: Store, kind: str) -> None:
    model = Model(1000, summarise=lambda messages: RequestFailed("not numbers"))
    face = Face(kind, store, model)
    for i in range(40):
        reply = await face.send(" ".join([f"q{i}"] * 10))
    failed, dropped = reply.notices
    assert (failed.kind, dropped.kind) == ("summary_failed", "dropped")
    assert dropped.first == 0
    assert dropped.end + len(model.requests[-1]) == 79
    assert len(face.talk.turns) == 80
    model.summarise = lambda messages: completion("All of it.")
    reply = await face.send("and now?")
    assert [notice.kind for notice in reply.notices] == ["summarised"]
    assert reply.notices[0].first == 0


@faces
async def test_the_summary_survives_a_restart_and_an_undo(store: Store, kind: str) -> None:
    face = Face(kind, store, Model(1000, summarise=lambda messages: completion("Fruit.")), name="long")
    while not store.summaries(face.talk.id):
        await face.send("w " * 30)
    other = Face(kind, store, Model(1000), id="long")
    await other.send("short")
    assert "Fruit." in text_of(other.model.requests[0][0])
    assert other.model.summaries == []
    covers = store.summaries(other.talk.id)[-1].covers
    while len(other.talk.turns) >= covers:
        other.talk.undo()
    assert store.summaries(other.talk.id) == []
    await other.send("new")
    assert "Fruit." not in "".join(map(text_of, other.model.requests[-1]))


@faces
async def test_the_answer_keeps_within_the_budget_too(store: Store, kind: str) -> None:
    asked: list[int | None] = []
    model = Model(1000)
    real = model.ask

    def ask(messages: Messages, sampling: SamplingParams) -> Completion:
        asked.append(sampling.max_tokens)
        return real(messages, sampling)

    model.ask = ask  # type: ignore[method-assign]
    face = Face(kind, store, model)
    await face.send("w " * 93)  # 100 tokens with the frame
    await face.send("again", sampling=SamplingParams(max_tokens=10**6))
    await face.send("short", sampling=SamplingParams(max_tokens=5))
    assert asked[0] == 900
    assert asked[1] is not None
    assert asked[1] < 900
    assert asked[2] == 5


def test_other_processes_turns_are_seen(store: Store, tmp_path: Path) -> None:
    model = Model(1000)
    talk = Conversation(store, model.ask, words_counted, 1000, name="both")
    talk.send("mine")
    with Store(tmp_path / "talk.db") as elsewhere:
        Conversation(elsewhere, Model(1000).ask, words_counted, 1000, id="both").send("theirs")
    talk.send("mine again")
    assert [text_of(m) for m in model.requests[-1]][::2] == ["mine", "theirs", "mine again"]


def test_wrong_words(store: Store) -> None:
    with pytest.raises(ConfigError, match="unknown strategy 'sumary'"):
        Conversation(store, Model(1).ask, words_counted, 1000, "sumary")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leaves"):
        Conversation(store, Model(1).ask, words_counted, 60)
    talk = Conversation(store, Model(1000).ask, words_counted, Budget(1000, 100, 64))
    with pytest.raises(ConfigError, match="without 'stream'"):
        next(talk.stream("x"))
    assert store.conversations() == [], "a conversation nobody spoke in is not kept"


# Crashes

CHILD = """
import os, signal, sys
from qvl.memory import Conversation, Store
from qvl.types import Answer, Completion, Usage
calls = 0
def ask(messages, sampling):
    global calls
    calls += 1
    if calls == 3:
        print("asking", flush=True)
        {in_ask}
    return Completion((Answer(0, f"answer {{calls}}", (), "stop"),), Usage(5, 2))
def stream(messages, sampling):
    from qvl.types import Delta
    yield Delta(0, "half an ")
    print("asking", flush=True)
    {in_ask}
    yield Delta(0, "answer", finish_reason="stop")
talk = Conversation(Store(sys.argv[1]), ask, lambda messages: 10 * len(messages), 1000, name="crash", stream=stream)
talk.send("first", {png!r})
talk.send("second")
if {streamed}:
    for delta in talk.stream("third", {png!r}):
        pass
else:
    talk.send("third", {png!r})
"""


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(60)"])
def test_a_killed_process_leaves_the_question_and_no_half_turn(tmp_path: Path, how: str, streamed: bool) -> None:
    path = tmp_path / "talk.db"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(in_ask=how, png=png(3), streamed=streamed), str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"asking\n"
    if "sleep" in how:
        os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=300)
    with Store(path) as store:
        talk = Conversation(store, Model(1000).ask, words_counted, 1000, id="crash")
        assert [text_of(turn.message) for turn in talk.turns] == ["first", "answer 1", "second", "answer 2", "third"]
        assert talk.unanswered
        assert store._read("PRAGMA integrity_check") == [("ok",)]
        assert media_of([store.resolve(talk.turns[-1].message)]) == [png(3)]
        assert talk.retry().text == "answer to third"


TALKER = """
import sys
from qvl.memory import Conversation, Store
from qvl.types import Answer, Completion, MediaPart, Message, TextPart, Usage
def ask(messages, sampling):
    if messages[0].role == "system":
        return Completion((Answer(0, "Words.", (), "stop"),), Usage(5, 2))
    return Completion((Answer(0, "answer to " + messages[-1].parts[-1].text, (), "stop"),), Usage(5, 2))
def count(messages):
    return sum(20 + len(part.text.split()) for m in messages for part in m.parts if isinstance(part, TextPart))
talk = Conversation(Store(sys.argv[1]), ask, count, 600, name="long", id=sys.argv[2] if len(sys.argv) > 2 else None)
number = len(talk.turns) // 2
if talk.unanswered:
    talk.retry()
    number += 1
while True:
    talk.send(f"question {number}", b"picture %d" % number)
    print(number, flush=True)
    number += 1
"""


def test_a_process_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    """At any moment: what was answered is there with its pictures, the rest is asked again, summaries tell of turns."""
    path, moments, told = tmp_path / "talk.db", random.Random(5), -1
    for life in range(4):
        command = [sys.executable, "-c", TALKER, str(path), *(["long"] if life else [])]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(moments.randrange(5, 12)):
            told = int(child.stdout.readline())
        time.sleep(moments.random() * 0.02)
        child.kill()
        told = max([told, *map(int, child.stdout.read().split(b"\n")[:-1])])
        child.wait(timeout=60)
        with Store(path) as store:
            assert store._read("PRAGMA integrity_check") == [("ok",)]
            (id,) = [info.id for info in store.conversations()]
            turns = store.turns(id)
            texts = [text_of(turn.message) for turn in turns]
            assert len(turns) in (2 * told + 2, 2 * told + 3, 2 * told + 4), "at most one turn is under way"
            assert texts[::2] == [f"question {i}" for i in range(len(texts[::2]))]
            assert texts[1::2] == [f"answer to question {i}" for i in range(len(texts) // 2)]
            shown = media_of([store.resolve(turn.message) for turn in turns])
            assert shown == [b"picture %d" % i for i in range(len(texts[::2]))]
            summaries = store.summaries(id)
            assert all(summary.covers <= len(turns) for summary in summaries)
    assert summaries, "some turns have left the window by now"


# The real wire: a server of the tiny checkpoint's tokenizer and intake, limited to 2,048 tokens


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Live]:
    with live(made(checkpoint, "fast", max_model_len=2048)) as running:
        yield running


def test_200_turns_through_a_server_of_2048_tokens(server: Live, store: Store) -> None:
    """`/tokenize` counts, the server itself refuses what is too long or holds too many pictures: it never has to."""
    with Client(server.url) as client:
        counter = ServerCounter(client.tokens)
        refused: list[Exception] = []

        def ask(messages: Messages, sampling: SamplingParams) -> Completion:
            if is_summary(messages):
                return completion("Pictures of noise were shown.")
            try:
                return client.chat(messages, sampling)
            except InvalidRequest as error:
                refused.append(error)
                raise

        talk = Conversation(store, ask, counter, 2048)
        since = time.monotonic()
        for i in range(200):
            media = (png(i),) if i % 2 == 0 else ()
            reply = talk.send(f"Turn {i}: what do you see?" * 4, *media, sampling=SamplingParams(max_tokens=24))
            assert reply.completion.usage.prompt_tokens == reply.prompt_tokens <= talk.budget.room
        print(f"200 turns in {time.monotonic() - since:.1f} s")
        assert refused == []
        assert len(talk.turns) == 400
        assert store.summaries(talk.id)


def test_a_stream_of_the_real_client(server: Live, store: Store) -> None:
    with Client(server.url) as client:
        counter = ServerCounter(client.tokens)
        talk = Conversation(store, client.chat, counter, 1024, "window", stream=client.stream, model=client.model)
        text = "".join(delta.text for delta in talk.stream("Hello", png(5), sampling=SamplingParams(max_tokens=9)))
        assert talk.last is not None
        assert talk.last.text == text
        assert talk.turns[-1].usage == talk.last.completion.usage
        assert talk.last.completion.usage.prompt_tokens == talk.last.prompt_tokens
