"""Which frames go into which question: within the room, in order, all of the time covered, none too large."""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qvl.errors import InvalidRequest
from qvl.media.clip import ClipFacts
from qvl.media.fetch import MediaPolicy
from qvl.media.load import load
from qvl.specs import ProcessorSpec
from qvl.tasks.film import Film, clock, fitted, plan, seconds_of
from qvl.types import MediaPart, PixelLimits
from tests.media.clips import clip, number_of

HD = ClipFacts(60.0, 30.0, 1080, 1920)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.1, 2000),
    st.sampled_from([0.0, 1.0, 25.0, 59.94]),
    st.sampled_from([(1080, 1920), (48, 64), (2160, 3840), (480, 270)]),
    st.sampled_from([0.1, 1.0, 2.0, 8.0]),
    st.integers(200, 40_000),
)
def test_a_plan_keeps_to_the_room(
    seconds: float, clip_fps: float, size: tuple[int, int], fps: float, room: int
) -> None:
    stretches = plan(ClipFacts(seconds, clip_fps, *size), fps=fps, begin=0.0, end=None, room=room)
    assert stretches[0].begin == 0 and stretches[-1].end == pytest.approx(seconds)
    for one, other in pairwise(stretches):
        assert one.end == other.begin and one.moments[-1] <= other.moments[0]
    for stretch in stretches:
        assert len(stretch.moments) % 2 == 0 and 2 <= len(stretch.moments) <= 768
        assert stretch.begin <= stretch.moments[0] and stretch.moments[-1] <= stretch.end
        height, width = fitted(*size, stretch.area)
        tokens = len(stretch.moments) // 2 * height * width // 784
        assert tokens <= room or len(stretch.moments) == 2
        assert len(stretch.moments) // 2 * height * width <= ProcessorSpec().video_total_pixels


def test_a_short_clip_goes_in_one_and_as_finely_as_there_is_room() -> None:
    (roomy,) = plan(HD, fps=2.0, begin=0.0, end=10.0, room=30_000)
    (scarce,) = plan(HD, fps=2.0, begin=0.0, end=10.0, room=3000)
    assert len(roomy.moments) == len(scarce.moments) == 20 and roomy.area > scarce.area
    assert roomy.moments[0] == 0 and roomy.moments[-1] == pytest.approx(10 - 1 / 30)


def test_a_long_clip_goes_in_parts_of_equal_length() -> None:
    stretches = plan(ClipFacts(600.0, 25.0, 1080, 1920), fps=2.0, begin=0.0, end=None, room=7000)
    lengths = {round(stretch.end - stretch.begin, 6) for stretch in stretches}
    assert len(stretches) > 10 and len(lengths) == 1
    assert sum(len(stretch.moments) for stretch in stretches) == pytest.approx(1200, rel=0.1)


def test_no_frame_is_invented() -> None:
    """A still of three frames is not stretched to more, and a slow clip is not oversampled."""
    (stretch,) = plan(ClipFacts(3.0, 1.0, 48, 64), fps=2.0, begin=0.0, end=None, room=8000)
    assert len(stretch.moments) == 4  # the models take an even number
    (stretch,) = plan(ClipFacts(0.1, 10.0, 48, 64), fps=2.0, begin=0.0, end=None, room=8000)
    assert len(stretch.moments) == 2


def test_times_outside_are_told() -> None:
    with pytest.raises(InvalidRequest, match="lasts 1:00"):
        plan(HD, fps=2.0, begin=60.0, end=None, room=8000)
    (stretch,) = plan(HD, fps=2.0, begin=55.0, end=99.0, room=8000)
    assert stretch.end == 60


def test_the_frames_of_every_part_are_those_of_its_time(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(100, 10))
    with Film(MediaPart("video", path)) as film:
        stretches = plan(film.facts, fps=2.0, begin=2.0, end=8.0, room=400)
        shots = list(film.shots(stretches))
    assert len(shots) > 1
    for shot in shots:
        numbers = [number_of(np.asarray(Image.open(io.BytesIO(frame)))) for frame in shot.frames]
        assert numbers == [int(moment * 10 + 0.01) for moment in shot.stretch.moments]
    assert path.read_bytes() == clip(100, 10)


def test_an_engine_takes_the_frames_as_they_are() -> None:
    """As many as were sampled, at the size they were given: nothing is sampled or resized twice."""
    with Film(MediaPart("video", clip(20, 10, size=(800, 448)))) as film:
        (stretch,) = plan(film.facts, fps=4.0, begin=0.0, end=None, room=1000)
        (shot,) = film.shots([stretch])
    loaded = load(shot.part, ProcessorSpec(), MediaPolicy(), PixelLimits(), resize_here=True)
    assert loaded.pixels.shape[0] == len(stretch.moments)
    assert (loaded.height, loaded.width) == loaded.original_size == fitted(448, 800, stretch.area)
    assert loaded.num_tokens <= 1000


def test_halves_hold_the_whole() -> None:
    with Film(MediaPart("video", clip(60, 10))) as film:
        (shot,) = film.shots(plan(film.facts, fps=2.0, begin=0.0, end=None, room=8000))
    first, second = shot.halves()
    assert first.frames + second.frames == shot.frames and len(first.frames) % 2 == 0
    assert (first.stretch.begin, second.stretch.end) == (shot.stretch.begin, shot.stretch.end)
    assert first.stretch.end == second.stretch.begin == second.stretch.moments[0]
    assert first.part.source.startswith("data:video/jpeg;base64,")
    assert base64.b64decode(first.part.source.partition(",")[2].split(",")[0]) == first.frames[0]


@pytest.mark.parametrize("text, seconds", [("90", 90), ("1:30", 90), ("0:07.5", 7.5), ("1:00:00", 3600), ("12s", 12)])
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-3", "1:2:3:4", "1h", "nan"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no time"):
        seconds_of(text)


def test_a_clock() -> None:
    assert [clock(s) for s in (0, 59.96, 61.5, 3600, 36000.04)] == ["0:00", "1:00", "1:01.5", "1:00:00", "10:00:00"]
