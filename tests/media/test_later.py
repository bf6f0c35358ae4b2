"""Pictures whose pixels come later: decoded once, and by whoever still wants them."""

from __future__ import annotations

import contextvars
import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from qvl.errors import BadMedia
from qvl.media.fetch import MediaPolicy
from qvl.media.given_up import given_up_by
from qvl.media.kept import Kept
from qvl.media.later import Decoding
from qvl.media.load import LoadedMedia, Once, keep_pictures, load
from qvl.media.stages import heard_by
from qvl.specs import ProcessorSpec
from qvl.types import MediaPart, PixelLimits

LIMIT = 120  # seconds
Work = Callable[[], None]


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, size=(512, 512, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def loaded(kept: Kept[LoadedMedia] | None = None, later: bool = True, empty: bool = True) -> LoadedMedia:
    place = (lambda shape: np.zeros(shape, np.uint8)) if empty else None
    part = MediaPart("image", jpeg())
    return load(
        part, ProcessorSpec(), MediaPolicy(), PixelLimits(), resize_here=False, kept=kept, empty=place, later=later
    )


def test_it_is_the_same_picture_and_decoded_once_for_all_who_have_it() -> None:
    now = loaded(empty=False)
    kept = keep_pictures()
    first, second = loaded(kept), loaded(kept)
    assert first is second
    assert not first.pixels.any()
    assert (first.digest, first.grid, first.num_tokens) == (now.digest, now.grid, now.num_tokens)
    heard: list[str] = []
    begun: list[Future[None]] = []
    gate = threading.BoundedSemaphore(1)

    def start(work: Work) -> Future[None]:
        begun.append(pool.submit(contextvars.copy_context().run, work))
        return begun[-1]

    assert first.decoding is not None
    with ThreadPoolExecutor(1) as pool, heard_by(lambda kind, stage, seconds: heard.append(stage)):
        for _ in range(2):
            first.decoding.begin(gate, start)
        for _ in range(2):
            first.decoding.finish(gate)
    assert (heard, len(begun), first.decoding.is_over) == (["decode"], 1, True)
    assert np.array_equal(first.pixels, now.pixels)


def test_who_does_not_ask_for_later_gets_pixels() -> None:
    kept = keep_pictures()
    begun = loaded(kept)
    assert not begun.pixels.any()
    assert loaded(kept, later=False) is begun
    assert np.array_equal(begun.pixels, loaded(empty=False).pixels)


def test_a_source_that_is_read_once_has_pixels_for_who_does_not_wait() -> None:
    once = MediaPart("image", Once(jpeg()))
    options = {"resize_here": False, "empty": lambda shape: np.zeros(shape, np.uint8)}
    first = load(once, ProcessorSpec(), MediaPolicy(), PixelLimits(), later=True, **options)  # type: ignore[arg-type]
    assert not first.pixels.any()
    assert load(once, ProcessorSpec(), MediaPolicy(), PixelLimits(), **options) is first  # type: ignore[arg-type]
    assert first.pixels.any()


def test_what_was_begun_by_one_who_left_is_done_by_one_who_did_not() -> None:
    """The one who began waits for a turn at the cores when its client goes."""
    done: list[int] = []
    decoding = Decoding(lambda: done.append(1))
    gate, left = threading.BoundedSemaphore(1), threading.Event()
    gate.acquire()

    def start(work: Work) -> Future[None]:
        with given_up_by(left):
            return pool.submit(contextvars.copy_context().run, work)

    with ThreadPoolExecutor(2) as pool:
        decoding.begin(gate, start)
        waiting = pool.submit(decoding.finish, gate)
        left.set()
        assert decoding._begun is not None
        assert isinstance(decoding._begun.exception(LIMIT), BadMedia)
        assert done == []
        gate.release()
        waiting.result(LIMIT)
    assert (done, decoding.is_over) == ([1], True)


def test_who_wants_to_know_is_told_as_soon_as_it_is_over_and_once() -> None:
    proceed, told = threading.Event(), list[str]()

    def decode() -> None:
        assert proceed.wait(LIMIT)

    decoding = Decoding(decode)
    with ThreadPoolExecutor(1) as pool:
        decoding.begin(threading.BoundedSemaphore(1), pool.submit)
        decoding.when_over(lambda: told.append("early"))
        assert told == []
        proceed.set()
        decoding.finish()
    assert told == ["early"]
    decoding.when_over(lambda: told.append("late"))
    decoding.finish()
    assert told == ["early", "late"]


def test_a_fault_is_told_to_everybody_who_comes() -> None:
    def fail() -> None:
        raise BadMedia("damaged")

    decoding = Decoding(fail)
    for _ in range(2):
        with pytest.raises(BadMedia, match="damaged"):
            decoding.finish()
    assert not decoding.is_over
