"""Clips by their time: how long, and which frame is on screen when."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from qvl.errors import BadMedia
from qvl.media.clip import clip_facts, frames_at
from qvl.media.fetch import MediaPolicy
from tests.media.clips import clip, number_of

POLICY = MediaPolicy()


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
def test_how_long_a_clip_is(container: str) -> None:
    facts = clip_facts(clip(35, 10, container=container), POLICY)
    assert facts.seconds == pytest.approx(3.5, abs=0.11) and facts.fps == pytest.approx(10)
    assert (facts.height, facts.width) == (48, 64)


def test_a_container_that_does_not_say_is_counted() -> None:
    """Raw H.264 has neither a length nor times."""
    assert clip_facts(clip(40, 25, container="h264"), POLICY).seconds == pytest.approx(40 / 25, abs=0.05)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_the_frame_on_screen_at_a_moment(container: str) -> None:
    moments = [0.0, 0.05, 0.1, 0.34, 1.0, 1.0, 3.4, 99.0]
    shown = [number_of(frame) for frame in frames_at(clip(35, 10, container=container), moments, POLICY)]
    assert shown == [0, 0, 1, 3, 10, 10, 34, 34]


def test_times_count_from_the_first_frame() -> None:
    """A clip cut out of a longer one keeps its old times."""
    data = clip(35, 10, container="matroska", start=500)
    assert [number_of(frame) for frame in frames_at(data, [0.0, 1.0, 2.5], POLICY)] == [0, 10, 25]


@pytest.mark.parametrize("first", [1.5, 2.0, 3.05, 3.3])
def test_a_late_beginning_is_jumped_to(first: float) -> None:
    for container in ("mp4", "matroska"):
        shown = [number_of(frame) for frame in frames_at(clip(35, 10, container=container), [first, 3.4], POLICY)]
        assert shown == [int(first * 10 + 0.01), 34]


def test_a_file_on_disk_is_read_as_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(35, 10))
    with path.open("rb") as file:
        assert clip_facts(file, POLICY).seconds == pytest.approx(3.5)
        file.seek(0)
        frames = frames_at(file, [0.0, 2.0], POLICY)
        assert number_of(next(frames)) == 0
        frames.close()


@pytest.mark.parametrize("data", [b"", b"no video at all", clip(3)[:200]])
def test_what_is_no_video_is_told(data: bytes) -> None:
    with pytest.raises(BadMedia):
        clip_facts(data, POLICY)
    with pytest.raises(BadMedia):
        list(frames_at(io.BytesIO(data), [0.0], POLICY))


def test_large_frames_are_refused() -> None:
    with pytest.raises(BadMedia, match="pixels"):
        list(frames_at(clip(3), [0.0], MediaPolicy(max_frame_pixels=100)))
