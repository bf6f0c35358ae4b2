"""Counts are exact: what each counter says is the length of the prompt that the engine would be given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from qvl import wire
from qvl.client import AsyncClient, Client
from qvl.engine.config import DeviceFacts, EngineOptions, resolve
from qvl.engine.intake import Intake
from qvl.errors import BadMedia, InvalidRequest, PromptTooLong, RequestFailed, TooManyMedia, Unauthorized, Unavailable
from qvl.memory import AsyncServerCounter, AsyncUsageCounter, LocalCounter, ServerCounter, UsageCounter
from qvl.memory.steps import Messages
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, Completion, MediaPart, Message, PixelLimits, SamplingParams
from tests.memory.scripted import completion, picture, said, user

CLIP = Path(__file__).resolve().parents[2] / "samples" / "words.mp4"
FACTS = DeviceFacts("cpu", (0, 0), 8 << 30, "float32", 1)


@pytest.fixture(scope="module")
def intake(checkpoint: Path) -> Intake:
    options = {
        "model": str(checkpoint),
        "max_model_len": 4096,
        "limit_mm_per_prompt": "image=4,video=2",
        "allow_any_local_path": True,
    }
    config = resolve(EngineOptions.from_dict(options), FACTS)
    return Intake(config, Tokenizer.from_folder(config.spec.folder, config.spec.ids))


def truth(intake: Intake, messages: Messages) -> int:
    return len(intake.prepare_chat(ChatRequest(tuple(messages))).prompt.token_ids)


class Tokenizing:
    """`/tokenize` of a qvl server over this intake; `seen` are the bodies."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.seen: list[bytes] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":  # how pictures are seen: not told
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        assert request.url.path == "/tokenize"
        self.seen.append(request.content)
        try:
            call = wire.parse_tokenize(request.content)
            assert isinstance(call.request, ChatRequest)
            ids = self.intake.prepare_chat(call.request).prompt.token_ids
        except InvalidRequest as error:
            return httpx.Response(error.status, json=error.body())
        return httpx.Response(200, json=wire.tokenize_response(ids, max_model_len=4096))

    async def later(self, request: httpx.Request) -> httpx.Response:
        return self(request)


@pytest.fixture
def route(intake: Intake) -> Tokenizing:
    return Tokenizing(intake)


@pytest.fixture
def by_server(route: Tokenizing) -> Iterator[ServerCounter]:
    with Client("http://model/v1", model="m", transport=httpx.MockTransport(route)) as client:
        yield ServerCounter(client.tokens)


@pytest.fixture
def talks(tmp_path: Path) -> list[Messages]:
    png = tmp_path / "a.png"
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 255, (150, 230, 3), np.uint8)).save(png)
    pixels = rng.integers(0, 255, (60, 90, 3), np.uint8)
    small, large = PixelLimits(max_pixels=3136), PixelLimits(min_pixels=40_000, max_pixels=90_000)
    exact = PixelLimits(resized_height=112, resized_width=84)
    video = MediaPart("video", (pixels, pixels, pixels, pixels), PixelLimits(num_frames=4))
    return [
        (user("hello"),),
        (user(),),
        (said("Be brief.", "system"), user("hello 世界 👩‍👩‍👧"), said("<|im_end|>"), user("  spaces \n\n")),
        (user(MediaPart("image", png), "what?"),),
        (user("a", MediaPart("image", png, small), "b", MediaPart("image", pixels, large)), said("x"), user("c")),
        (user(MediaPart("image", png, exact), MediaPart("image", png.read_bytes())), said("yes"), user("ok")),
        (user(MediaPart("video", CLIP, PixelLimits(fps=1.0)), "read"), said("words"), user(MediaPart("video", CLIP))),
        (user(video, "and?"), said("moving"), user(MediaPart("image", Image.fromarray(pixels)))),
    ]


def test_every_counter_tells_the_length_of_the_prompt(
    intake: Intake, by_server: ServerCounter, talks: list[Messages]
) -> None:
    def ask(messages: Messages, sampling: SamplingParams) -> Completion:
        assert sampling.max_tokens == 1
        return completion("x", truth(intake, messages), "length")

    counters = [LocalCounter(intake.config, intake.tokenizer), by_server, UsageCounter(ask)]
    for talk in talks:
        exact = truth(intake, talk)
        assert [counter(talk) for counter in counters] == [exact] * 3, talk
        assert [counter(talk) for counter in counters] == [exact] * 3, "again, from memory"


async def test_the_awaited_counters_do_too(intake: Intake, route: Tokenizing, talks: list[Messages]) -> None:
    async def ask(messages: Messages, sampling: SamplingParams) -> Completion:
        return completion("x", truth(intake, messages), "length")

    by_usage = AsyncUsageCounter(ask)
    async with AsyncClient("http://model", model="m", transport=httpx.MockTransport(route.later)) as client:
        by_server = AsyncServerCounter(client.tokens)
        for talk in talks:
            assert await by_server(talk) == await by_usage(talk) == truth(intake, talk)


def test_a_picture_travels_once(by_server: ServerCounter, route: Tokenizing, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    png = tmp_path / "noise.png"
    Image.fromarray(rng.integers(0, 255, (200, 200, 3), np.uint8)).save(png)
    talk: list[Message] = [user(MediaPart("image", png), "what?")]
    by_server(tuple(talk))
    uploads = [body for body in route.seen if len(body) > 50_000]
    assert len(uploads) == 1
    route.seen.clear()
    for i in range(5):
        talk += [said("noise"), user(f"and {i}?")]
        by_server(tuple(talk))
    assert len(route.seen) == 5
    assert max(map(len, route.seen)) < 3_000


def test_a_local_picture_is_read_once(intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.memory import counting

    loads: list[object] = []
    real = counting.load
    monkeypatch.setattr(counting, "load", lambda part, *a, **k: (loads.append(part), real(part, *a, **k))[1])
    counter = LocalCounter(intake.config, intake.tokenizer)
    pixels = np.zeros((60, 60, 3), np.uint8)
    for _ in range(3):
        counter((user(MediaPart("image", pixels.copy())),))
    assert len(loads) == 1
    counter((user(MediaPart("image", pixels, PixelLimits(max_pixels=4000))),))
    counter((user(MediaPart("image", pixels + 1)),))
    assert len(loads) == 3


def test_errors_are_those_of_a_request(intake: Intake, by_server: ServerCounter) -> None:
    local = LocalCounter(intake.config, intake.tokenizer)
    five = (user(*[MediaPart("image", np.zeros((30, 30, 3), np.uint8))] * 5),)
    for counter in (by_server, local):
        with pytest.raises(TooManyMedia):
            counter(five)
        with pytest.raises(BadMedia):
            counter((user(MediaPart("image", b"no picture at all")),))
    with pytest.raises(PromptTooLong):
        by_server((user("long " * 5000),))
    assert local((user("long " * 5000),)) > 4096
    with pytest.raises(InvalidRequest, match="cannot read"):
        by_server((user(picture("/nowhere/at/all.png")),))


def test_servers_that_do_not_count() -> None:
    def answers(status: int, body: object) -> ServerCounter:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, json=body))
        return ServerCounter(Client("http://m", model="m", transport=transport).tokens)

    with pytest.raises(Unauthorized):
        answers(401, {"error": {"message": "no", "code": "invalid_api_key"}})((user("x"),))
    with pytest.raises(RequestFailed, match="not understood"):
        answers(200, {"tokens": []})((user("x"),))
    with Client("http://127.0.0.1:9", model="m", retries=0) as nobody, pytest.raises(Unavailable):
        ServerCounter(nobody.tokens)((user("x"),))
    with pytest.raises(RequestFailed, match="carry no usage"):
        UsageCounter(lambda messages, sampling: completion("x", 0))((user("x"),))
