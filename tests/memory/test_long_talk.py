"""The conversation of the project's promise: many turns, each with a picture, through a real server of 2,048 tokens.

The bundled checkpoint answers. No request may be refused, and what it says about the last picture must be right, with
whoever makes the conversation fit: the server, which gets it whole every time, or `qvl.memory` on the client's side.
Short ones run by default, those of 200 turns with `pytest -m slow` (some minutes).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from qvl.backends.local import LocalBackend
from qvl.client import Client
from qvl.engine.options import EngineOptions
from qvl.memory import Conversation, ServerCounter, Store, Strategy
from qvl.server.options import ServerOptions
from qvl.types import SamplingParams
from tests.server.live import Live, live
from tests.server.test_metrics import numbers

CONTEXT = 2048
ANSWER = 1024  # asked for, so that this much of the context stays free for it
QUESTION = "Read the text."
# No letter stands twice in a row: the tiny checkpoint may miscount those when many pictures are before it.
WORDS = (
    "River Stone Cloud Garden Window Bridge Forest Castle Dragon Silver Golden Winter Tiger Planet Rocket School "
    "Market Doctor Number Orange Purple Basket Candle Jacket Kitchen Ladder Needle Pencil Shadow Ticket Turtle "
    "Wagon Zebra Anchor Blanket Camera Desert Engine Finger Guitar Helmet"
).split()


def lengths(short: int) -> pytest.MarkDecorator:
    """The window is full after six turns."""
    return pytest.mark.parametrize("turns", [short, pytest.param(200, marks=pytest.mark.slow)])


def label(number: int) -> str:
    """What picture `number` says: never the same twice in 200, and nothing like its neighbours."""
    tens = number * 7 % 9 + 1
    return f"{WORDS[number % len(WORDS)]} {tens}{(tens + 1 + number // 9 % 8) % 10}"


def png(number: int) -> bytes:
    """Big print on paper, 96 tokens."""
    face = ImageFont.load_default(44)
    picture = Image.new("RGB", (336, 224), (250, 248, 243))
    ImageDraw.Draw(picture).text((168, 112), label(number), (25, 25, 30), face, anchor="mm")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """Sixteen pictures may come at once, so that it is the tokens that run out."""
    engine = EngineOptions(
        model="demo", num_threads=1, max_model_len=CONTEXT, limit_mm_per_prompt={"image": 16}, kv_cache_memory=256 << 20
    )
    with live(LocalBackend(engine), ServerOptions(overflow="window")) as running:
        yield running


def turn(role: str, text: str, *pictures: bytes) -> dict[str, Any]:
    urls = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def talk_whole(server: Live, turns: int, **more: Any) -> list[dict[str, Any]]:
    """A client that knows nothing of budgets: sends all that was said, every time. What each answer told of it."""
    messages = [turn("system", "You read pictures.")]
    told = []
    for number in range(turns):
        messages.append(turn("user", QUESTION, png(number)))
        body = {"messages": messages, "max_tokens": ANSWER, "temperature": 0, **more}
        reply = server.post("/v1/chat/completions", body)
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert answer["usage"]["prompt_tokens"] <= CONTEXT - ANSWER
        text = answer["choices"][0]["message"]["content"]
        assert text == label(number)
        messages.append(turn("assistant", text))
        told.append(answer.get("qvl"))
    return told


def test_the_pictures_differ() -> None:
    assert len({label(number) for number in range(200)}) == 200


@lengths(24)
def test_the_server_drops_the_oldest_turns(server: Live, turns: int) -> None:
    told = talk_whole(server, turns)
    kept = [2 * (number + 1) - 1 - (one["dropped_messages"] if one else 0) for number, one in enumerate(told)]
    assert told[0] is None
    assert told[-1]["dropped_messages"] == told[-1]["dropped_media"] * 2 > 0
    assert max(kept) <= 15, "the tokens have run out before the pictures"
    assert min(kept[8:]) >= 7, "several earlier turns are still there"
    assert numbers(server)["qvl_overflowed_requests_total{strategy=window}"] >= turns - 8


@lengths(16)
def test_the_server_sums_up(server: Live, turns: int) -> None:
    """What the tiny checkpoint says when it is asked for a summary is no summary; the conversation does not mind."""
    told = talk_whole(server, turns, overflow="summary")
    assert told[-1]["overflow"] == "summary"
    calls = sum(value for name, value in numbers(server).items() if name.startswith("qvl_summary_seconds_count"))
    assert calls > 0


@lengths(16)
@pytest.mark.parametrize("strategy", ["window", "summary"])
def test_the_client_keeps_to_a_budget(server: Live, turns: int, strategy: Strategy, tmp_path: Path) -> None:
    budget = ANSWER  # of a server of 2,048 tokens it uses half, and never asks for more
    with Client(server.url) as client, Store(tmp_path / "talk.db") as store:
        counter = ServerCounter(client.tokens)
        talk = Conversation(store, client.chat, counter, budget, strategy, system="You read pictures.")
        for number in range(turns):
            reply = talk.send(QUESTION, png(number), sampling=SamplingParams(temperature=0.0))
            assert reply.text == label(number), reply.notices
            assert reply.prompt_tokens == reply.completion.usage.prompt_tokens <= talk.budget.room
        assert len(talk.turns) == 1 + 2 * turns
        pictures = [store.resolve(one.message).parts[0] for one in talk.turns if one.message.role == "user"]
        assert [getattr(part, "source", None) for part in pictures] == [png(number) for number in range(turns)]
