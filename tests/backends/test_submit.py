"""Pictures on their way to the engine, many at a time: each answer is about its own, and nothing is left over."""

from __future__ import annotations

import asyncio
import gc
import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl.backends.base import collect
from qvl.backends.local import LocalBackend
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import NUM_TICKETS
from qvl.errors import BadMedia
from qvl.media import image
from qvl.media.image import decode_image
from qvl.types import ChatRequest, MediaPart, Message, SamplingParams, TextPart
from tests.backends.conftest import until

ROUNDS, AT_ONCE = 12, 8
LIMIT = 120  # seconds for a round that takes a half; who is forgotten waits for ever
KEPT_BYTES = 1 << 20  # fewer than are asked about, so that places change hands and some pictures go by file


class Shown:
    """A file; `said`: what the fake engine says of it, None where it is damaged."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (*rng.integers(30, 300, 2), 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG" if seed % 5 == 4 else "JPEG")
        self.data = file.getvalue()
        self.said: int | None = None
        if seed % 7 == 6:
            self.data = self.data[: len(self.data) // 2]
        else:
            self.said = 97 + int(decode_image(self.data, max_pixels=10**6).sum()) % 26


async def ask(backend: LocalBackend, files: list[Shown], n: int, leave_after: float | None) -> None:
    parts: list[MediaPart | TextPart] = [*(MediaPart("image", file.data) for file in files), TextPart("look")]
    request = ChatRequest((Message("user", tuple(parts)),), SamplingParams(n=n))
    task = asyncio.ensure_future(collect(backend.chat(request, "r")))
    if leave_after is not None:
        await asyncio.sleep(leave_after)
        task.cancel()
    try:
        done = await task
    except asyncio.CancelledError:
        assert leave_after is not None
    except BadMedia:
        assert any(file.said is None for file in files)
    else:
        for answer in done.answers:
            assert list(answer.token_ids[-1 - len(files) : -1]) == [file.said for file in files]


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_comes_and_goes_gets_what_was_asked_for(
    seed: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "WORTH_WAITING_FOR", 0)
    rng, files = random.Random(seed), [Shown(number) for number in range(28)]
    options = {"model": str(checkpoint), "limit_mm_per_prompt": {"image": 3}, "mm_processor_kwargs": {"min_pixels": 1}}
    command = (sys.executable, "-m", "tests.engine.fake_engine", "gpu")
    backend = LocalBackend(EngineOptions.from_dict(options), command=command, kept_bytes=KEPT_BYTES)
    await backend.start()
    try:
        await until(lambda: backend._store.empty((1,)) is not None, "nothing is shared")
        room = backend._store.room
        assert room is not None
        for _ in range(ROUNDS):
            asked = [rng.choices(files, k=rng.randint(1, 3)) for _ in range(AT_ONCE)]
            leave = [rng.random() / 10 if rng.random() < 0.3 else None for _ in range(AT_ONCE)]
            asking = (ask(backend, one, rng.choice((1, 1, 2)), after) for one, after in zip(asked, leave, strict=True))
            await asyncio.wait_for(asyncio.gather(*asking), LIMIT)

        def all_back() -> bool:
            gc.collect()
            room.empty((1,))  # looks for leavers
            return len(room._tickets) == NUM_TICKETS - 1 and not any(one.promised for one in room._places.values())

        await until(all_back, "tickets are lost")
    finally:
        await backend.stop()
