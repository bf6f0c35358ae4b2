"""Stages are told once each, without what lies inside them, and only to who listens in this thread."""

from __future__ import annotations

import base64
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from qvl.errors import BadMedia
from qvl.media import fetch, stages
from qvl.media.fetch import MediaPolicy
from qvl.media.load import load
from qvl.media.stages import heard_by, reported, stage
from qvl.specs import ProcessorSpec
from qvl.types import MediaPart, PixelLimits
from tests.server.shapes import picture


class Time:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Medium:
    kind: Any = "image"


def test_a_stage_inside_another_is_counted_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(stages, "time", clock)

    @stage("inner")
    def inner(seconds: float) -> None:
        clock.now += seconds

    @stage("outer")
    def outer() -> None:
        clock.now += 1
        inner(10)
        inner(20)
        clock.now += 2

    @reported
    def work(medium: Medium) -> str:
        inner(100)
        outer()
        return "done"

    heard: dict[str, float] = {}
    with heard_by(lambda kind, name, seconds: heard.update({f"{kind} {name}": seconds})):
        assert work(Medium()) == "done"
    assert heard == {"image inner": 130.0, "image outer": 3.0}


def test_a_picture_goes_through_all_of_them() -> None:
    heard: dict[str, list[float]] = defaultdict(list)
    spec = ProcessorSpec(
        min_pixels=3136,
        max_pixels=50_176,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
    )
    part = MediaPart("image", picture(40))
    with heard_by(lambda kind, name, seconds: heard[f"{kind} {name}"].append(seconds)):
        load(part, spec, MediaPolicy(), PixelLimits(max_pixels=10_000), resize_here=True)
        thread = threading.Thread(
            target=load, args=(part, spec, MediaPolicy(), PixelLimits()), kwargs={"resize_here": True}
        )
        thread.start()
        thread.join()
    load(part, spec, MediaPolicy(), PixelLimits(), resize_here=True)
    assert set(heard) == {"image fetch", "image decode", "image resize", "image hash"}
    assert all(len(times) == 1 and times[0] > 0 for times in heard.values())


def test_what_failed_is_not_told() -> None:
    heard: list[str] = []

    @reported
    def broken(medium: Medium) -> None:
        stage("decode")(np.zeros)(3)
        raise ValueError

    with heard_by(lambda kind, name, seconds: heard.append(name)), pytest.raises(ValueError):
        broken(Medium())
    assert heard == []


@pytest.mark.parametrize("size", [0, 1, 196_607, 196_608, 196_609, 500_000])
def test_base64_in_slices_is_base64(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert fetch.read(url, MediaPolicy(), expect="image") == data
    assert fetch.read(url.replace("A", "\nA"), MediaPolicy(), expect="image") == data


@pytest.mark.parametrize("place", [262_143, 262_144, 262_147, 300_000])
def test_padding_before_the_end_is_refused_wherever_it_stands(place: int) -> None:
    """Also where a slice ends: by itself that slice would be good base64."""
    text = "A" * 400_000
    with pytest.raises(BadMedia):
        fetch.read(f"data:image/png;base64,{text[:place]}={text[place + 1 :]}", MediaPolicy(), expect="image")
