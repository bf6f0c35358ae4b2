"""LocalBackend over a fake engine in a real process: text, counts, pictures, aborts, deaths."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvl.backends.base import collect
from qvl.backends.local import LocalBackend
from qvl.engine.options import EngineOptions
from qvl.errors import BadMedia, ConfigError, InvalidRequest, PromptTooLong, QvlError, RequestFailed, Unavailable
from qvl.media import image
from qvl.media.image import decode_image
from qvl.types import (
    ChatRequest,
    CompletionRequest,
    Delta,
    MediaPart,
    Message,
    SamplingParams,
    TextPart,
    TokenLogprob,
    Usage,
)
from tests.backends.conftest import Start, made, until
from tests.engine.fake_engine import BAD, CRASH, POISON

SHARED = ["image: fetch", "image: hash", "image: share", "prepare", "first_token"]  # stages of every picture request


def ask(text: str, **sampling: object) -> CompletionRequest:
    """The fake engine answers with the prompt."""
    return CompletionRequest(text, SamplingParams(**sampling))  # type: ignore[arg-type]


def show(*arrays: np.ndarray | bytes, **sampling: object) -> ChatRequest:
    parts = (*(MediaPart("image", array) for array in arrays), TextPart("look"))
    return ChatRequest((Message("user", parts),), SamplingParams(**sampling))  # type: ignore[arg-type]


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "JPEG")
    return file.getvalue()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)


async def deltas_of(backend: LocalBackend, request: CompletionRequest) -> list[Delta]:
    return [delta async for delta in backend.complete(request, "r")]


async def test_text_and_exact_counts(backend_of: Start) -> None:
    async with backend_of() as backend:
        assert backend.not_ready is None
        count = len(await backend.tokenize(ask("日本語 text 🙂 with words")))
        done = await collect(backend.complete(ask("日本語 text 🙂 with words"), "r"))
        assert done.text == "日本語 text 🙂 with words"
        assert done.answers[0].finish_reason == "stop"
        assert done.usage == Usage(count, count + 1, 2), "the end token is counted, as it was computed"
        cut = await collect(backend.complete(ask("日本語 text 🙂 with words", max_tokens=2), "r"))
        assert (cut.answers[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)


class Heard:
    def __init__(self) -> None:
        self.stages: list[str] = []

    def request_stage(self, stage: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(stage)

    def media_stage(self, kind: str, stage: str, seconds: float) -> None:
        self.stages.append(f"{kind}: {stage}")


async def test_an_observer_hears_of_every_stage_once(backend_of: Start) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(1)).save(file, "PNG")
    again = ChatRequest((Message("user", (MediaPart("image", file.getvalue()),)),), SamplingParams())
    async with backend_of() as backend:
        backend.observer = heard = Heard()
        first = await collect(backend.chat(again, "a"))
        assert sorted(heard.stages) == sorted([*SHARED, "image: decode", "image: resize"])
        heard.stages.clear()
        second = await collect(backend.chat(again, "b"))
        assert sorted(heard.stages) == sorted(SHARED), "decoded once"
        assert first.text == second.text, "the engine got the same pixels, although it had unlinked the first file"


async def test_no_delta_ends_in_half_a_character(backend_of: Start) -> None:
    async with backend_of("slow") as backend:
        deltas = await deltas_of(backend, ask("🙂🙃 é"))
        assert "".join(delta.text for delta in deltas) == "🙂🙃 é"
        assert all("\ufffd" not in delta.text for delta in deltas)
        assert len(deltas) < deltas[-1].usage.completion_tokens, "tokens without text of their own wait for the next"
        assert sum(len(delta.token_ids) for delta in deltas) == deltas[-1].usage.completion_tokens


async def test_a_stop_string_ends_the_answer_and_the_work(backend_of: Start) -> None:
    async with backend_of("slow") as backend:
        request = ask("one two three " + "x y z " * 40, stop=("three",))
        done = await collect(backend.complete(request, "r"))
        assert done.text == "one two "
        assert (done.answers[0].finish_reason, done.answers[0].stop_reason) == ("stop", "three")
        assert done.usage.completion_tokens == len(done.answers[0].token_ids)
        assert done.usage.completion_tokens < 20
        await until(lambda: backend.stats()["aborted_total"] == 1, "the engine was not told")
        assert backend.stats()["running"] == 0


async def test_a_consumer_that_lags_gets_the_rest_at_once(backend_of: Start) -> None:
    async with backend_of() as backend:
        stream = backend.complete(ask("a b c d e f g h i j k l m n o p"), "r")
        first = await anext(stream)
        await until(lambda: backend.stats()["running"] == 0, "the engine never came to the end")
        rest = [delta async for delta in stream]
        assert len(rest) <= 2
        assert first.text + "".join(delta.text for delta in rest) == "a b c d e f g h i j k l m n o p"


async def test_several_answers_share_prompt_and_picture(backend_of: Start) -> None:
    async with backend_of() as backend:
        done = await collect(backend.chat(show(picture(1), n=3), "r"))
        assert [answer.index for answer in done.answers] == [0, 1, 2]
        assert len({answer.text for answer in done.answers}) == 1
        assert done.usage.completion_tokens == sum(len(answer.token_ids) for answer in done.answers)
        assert leftovers(backend) == []


async def test_the_engine_sees_the_pixels_that_were_sent(backend_of: Start) -> None:
    """The fake engine's last tokens are sums of the pixels it got."""
    async with backend_of(mm_processor_kwargs={"min_pixels": 1}) as backend:
        pictures = [picture(seed) for seed in range(3)]
        done = await collect(backend.chat(show(*pictures), "r"))
        sums = [97 + int(array.sum()) % 26 for array in pictures]  # 56 x 84 needs no resize
        assert list(done.answers[0].token_ids[-4:-1]) == sums
        assert leftovers(backend) == []


@pytest.mark.parametrize("worth_waiting_for", [0, 10**6])
async def test_with_a_gpu_pixels_lie_in_memory_that_the_engine_shares(
    worth_waiting_for: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded there, handed over there, given back; the same after the engine was replaced."""
    monkeypatch.setattr(image, "WORTH_WAITING_FOR", worth_waiting_for)
    options = EngineOptions.from_dict({"model": str(checkpoint), "mm_processor_kwargs": {"min_pixels": 1}})
    command = (sys.executable, "-m", "tests.engine.fake_engine", "gpu")
    backend = LocalBackend(options, command=command, kept_bytes=1 << 20)
    await backend.start()
    try:
        for life in range(2):
            await until(lambda: backend._store.empty((1,)) is not None, "nothing is shared")
            room = backend._store.room
            assert room is not None
            for seed in (1, 2, 1):
                done = await collect(backend.chat(show(jpeg(seed), n=2), f"{life}-{seed}"))
                total = int(decode_image(jpeg(seed), max_pixels=10**6).sum())
                assert [answer.token_ids[-2] for answer in done.answers] == [97 + total % 26] * 2
            assert leftovers(backend) == []
            assert len(room._places) == 2, "a file that came again lies where it lay"
            if life == 0:
                assert backend.engine_pid is not None
                os.kill(backend.engine_pid, signal.SIGKILL)
                await until(lambda: backend.not_ready is not None, "nobody noticed")
                assert backend._store.room is None
                await until(lambda: backend.not_ready is None, "no new engine came up")
            assert (backend._store.room is room) == (life == 1)
    finally:
        await backend.stop()


@asynccontextmanager
async def sharing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalBackend]:
    """A backend whose engine shares memory with it and hears of all JPEGs before they are decoded."""
    monkeypatch.setattr(image, "WORTH_WAITING_FOR", 0)
    command = (sys.executable, "-m", "tests.engine.fake_engine", "gpu")
    backend = LocalBackend(EngineOptions(model=str(checkpoint)), command=command, kept_bytes=1 << 20)
    await backend.start()
    try:
        await until(lambda: backend._store.empty((1,)) is not None, "nothing is shared")
        yield backend
    finally:
        await backend.stop()


async def test_an_observer_hears_of_what_is_decoded_later(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with sharing(checkpoint, monkeypatch) as backend:
        backend.observer = heard = Heard()
        for more in (["image: decode"], []):
            heard.stages.clear()
            await collect(backend.chat(show(jpeg(1)), "r"))
            assert sorted(heard.stages) == sorted([*SHARED, *more])


async def test_a_jpeg_whose_end_is_missing_is_refused_by_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has heard of it by then, since its head is good."""
    async with sharing(checkpoint, monkeypatch) as backend:
        room = backend._store.room
        assert room is not None
        for _ in range(2):
            with pytest.raises(BadMedia, match="picture 2: the picture is damaged"):
                await collect(backend.chat(show(jpeg(1), jpeg(2)[:-400]), "r"))
        with pytest.raises(BadMedia):
            await backend.tokenize(show(jpeg(2)[:-400]))
        await until(lambda: backend.stats()["waiting"] == 0, "the engine still waits for it")
        assert (await collect(backend.chat(show(jpeg(1)), "r"))).answers[0].finish_reason == "stop"
        await until(lambda: not any(place.promised for place in room._places.values()), "it is still promised")


async def test_who_leaves_while_a_picture_is_decoded_leaves_nothing_behind(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, proceed = threading.Event(), threading.Event()
    real = image._fill

    def slow(*args: Any) -> None:
        begun.set()
        assert proceed.wait(120)
        real(*args)

    monkeypatch.setattr(image, "_fill", slow)
    async with sharing(checkpoint, monkeypatch) as backend:
        room = backend._store.room
        assert room is not None
        asking = asyncio.ensure_future(collect(backend.chat(show(jpeg(1)), "r")))
        assert await asyncio.to_thread(begun.wait, 120)
        await until(lambda: backend.stats()["waiting"] == 1, "the engine knows of it before its pixels have come")
        assert (await collect(backend.complete(ask("pass by"), "t"))).text == "pass by"
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: backend.stats()["waiting"] == 0, "the engine still waits for it")
        assert any(place.promised for place in room._places.values()), "it is still written to"
        proceed.set()
        await until(lambda: not any(place.promised for place in room._places.values()), "it is still promised")


async def test_pictures_are_counted_in_the_prompt(backend_of: Start) -> None:
    async with backend_of() as backend:
        without = await backend.tokenize(ChatRequest((Message("user", (TextPart("look"),)),)))
        with_one = await backend.tokenize(show(picture(0)))
        assert len(with_one) == len(without) + 6 + 2  # 2 x 3 tokens and the two marks around them


async def test_echo_puts_the_prompt_in_front(backend_of: Start) -> None:
    async with backend_of() as backend:
        request = CompletionRequest("say ", SamplingParams(n=2), echo=True)
        assert [answer.text for answer in (await collect(backend.complete(request, "r"))).answers] == ["say say "] * 2


async def test_logprobs_arrive_with_their_tokens(backend_of: Start) -> None:
    async with backend_of() as backend:
        done = await collect(backend.complete(ask("a b", logprobs=0), "r"))
        answer = done.answers[0]
        assert answer.logprobs == tuple(TokenLogprob(token_id, -0.5) for token_id in answer.token_ids)


async def test_closing_the_stream_aborts(backend_of: Start) -> None:
    async with backend_of("slow") as backend:
        stream = backend.complete(ask("word " * 200), "r")
        await anext(stream)
        assert backend.stats()["running"] == 1
        await stream.aclose()
        await until(lambda: backend.stats()["running"] == 0, "the engine still works on it")


async def test_cancelling_during_intake_leaves_nothing_behind(backend_of: Start) -> None:
    async with backend_of("slow") as backend:
        task = asyncio.ensure_future(collect(backend.chat(show(*[picture(n) for n in range(4)]), "r")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: leftovers(backend) == [], "pixel files stay behind")
        assert backend.stats()["running"] == 0


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (CompletionRequest((BAD,)), RequestFailed),
        (CompletionRequest((5, POISON)), RequestFailed),
        (CompletionRequest((10**6,)), InvalidRequest),
        (ask("x y " * 4000), PromptTooLong),
    ],
)
async def test_one_bad_request_is_its_own_failure(
    backend_of: Start, request_: CompletionRequest, error: type[QvlError]
) -> None:
    async with backend_of(max_model_len=512) as backend:
        with pytest.raises(error):
            await collect(backend.complete(request_, "r"))
        assert (await collect(backend.complete(ask("still here"), "r"))).text == "still here"


async def test_many_at_once_do_not_mix(backend_of: Start) -> None:
    async with backend_of() as backend:
        texts = [f"number {n} of many" for n in range(64)]
        done = await asyncio.gather(*(collect(backend.complete(ask(text), "same-id")) for text in texts))
        assert [one.text for one in done] == texts


async def test_an_engine_that_dies_fails_its_requests_and_is_replaced(backend_of: Start) -> None:
    async with backend_of("slow") as backend:
        old = backend.engine_pid
        running = asyncio.ensure_future(collect(backend.complete(ask("word " * 200), "r")))
        await until(lambda: backend.stats()["running"] == 1, "it does not run")
        assert old is not None
        os.kill(old, signal.SIGKILL)
        with pytest.raises(Unavailable, match="engine process ended"):
            await running
        assert backend.not_ready is not None
        with pytest.raises(Unavailable):
            await collect(backend.complete(ask("too early"), "r"))
        await until(lambda: backend.not_ready is None, "no new engine came up")
        assert backend.engine_pid not in (None, old)
        assert (await collect(backend.complete(ask("again"), "r"))).text == "again"
        assert backend.stats()["restarts_total"] == 1


async def test_a_crash_in_a_step_is_survived_too(backend_of: Start) -> None:
    async with backend_of() as backend:
        with pytest.raises(Unavailable):
            await collect(backend.complete(CompletionRequest((5, CRASH)), "r"))
        await until(lambda: backend.not_ready is None, "no new engine came up")
        assert (await collect(backend.complete(ask("again"), "r"))).text == "again"


@pytest.mark.parametrize(("mood", "says"), [("refuses", "refuses to start"), ("breaks", "ZeroDivisionError")])
async def test_a_first_start_that_fails_is_an_error_of_configuration(checkpoint: Path, mood: str, says: str) -> None:
    backend = made(checkpoint, mood)
    with pytest.raises(ConfigError, match=says):
        await backend.start()
    assert backend.engine_pid is None
    await backend.stop()


async def test_a_worker_that_cannot_even_begin(checkpoint: Path) -> None:
    backend = made(checkpoint, "fast")
    backend._engine._command = (sys.executable, "-c", "raise SystemExit(7)")
    with pytest.raises(ConfigError, match="exit code 7"):
        await backend.start()


async def test_a_missing_checkpoint_is_told_before_anything_starts(tmp_path: Path) -> None:
    backend = made(tmp_path / "nothing", "fast")
    with pytest.raises(ConfigError):
        await backend.start()
    assert backend.engine_pid is None


async def test_launched_early_and_started_later_is_one_process(checkpoint: Path) -> None:
    """What loads the model can begin before there is a loop, while the HTTP stack is still being imported."""
    backend = made(checkpoint, "fast")
    backend.launch()
    pid = backend.engine_pid
    assert pid is not None
    await backend.start()
    assert backend.engine_pid == pid
    assert (await collect(backend.complete(ask("hello"), "r"))).text == "hello"
    await backend.stop()


async def test_stop_ends_the_process_the_requests_and_the_folders(backend_of: Start) -> None:
    async with backend_of("slow") as backend:
        folders = [*backend._engine.folders, backend._engine.socket.parent]
        assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
        pid = backend.engine_pid
        running = asyncio.ensure_future(collect(backend.complete(ask("word " * 200), "r")))
        await until(lambda: backend.stats()["running"] == 1, "it does not run")
        await backend.stop()
        with pytest.raises(Unavailable, match="shutting down"):
            await running
        assert not any(folder.exists() for folder in folders)
        assert pid is not None
        await until(lambda: not Path(f"/proc/{pid}").exists(), "the engine process lives on")
        await backend.stop()


def leftovers(backend: LocalBackend) -> list[Path]:
    return [path for folder in backend._engine.folders for path in folder.glob("*.rgb*")]


async def test_a_fetch_that_was_left_gives_its_thread_back(backend_of: Start) -> None:
    """The host accepts and says nothing; its time-out is long."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/never.jpg"
        request = ChatRequest((Message("user", (MediaPart("image", url),)),))
        async with backend_of(allow_private_hosts=True) as backend:
            task = asyncio.ensure_future(collect(backend.chat(request, "r")))
            await until(lambda: backend._media_pool._work_queue.empty() and bool(backend._media_pool._threads), "idle")
            await asyncio.sleep(0.1)
            assert backend._media_pool._idle_semaphore._value == 0, "its thread is busy"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: backend._media_pool._idle_semaphore._value == 1, "the thread is still held")
