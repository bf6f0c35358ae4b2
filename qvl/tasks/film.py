"""Which frames of a clip are shown in which question, and at what size; and those frames, ready to be sent.

Arithmetic over time, tokens and pixels (of the Qwen-VL models' video rules), and the reading of one part at a time. A
clip never goes out whole: only what a model is to see does. Does not know questions.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from qvl.errors import InvalidRequest
from qvl.media.clip import ClipFacts, clip_facts, frames_at
from qvl.media.fetch import MediaPolicy, read
from qvl.media.resize import resize_bicubic
from qvl.media.sizes import frame_size
from qvl.media.video import Pixels
from qvl.specs import ProcessorSpec
from qvl.types import MediaPart, PixelLimits

RULE = ProcessorSpec()  # what all checkpoints of the family say about videos
PAIR = RULE.temporal_patch_size  # frames that become one step for the model
FINE, MEDIUM, COARSE = 768, 256, 128  # tokens of a pair of frames: the most, what long clips get, the least
QUALITY = 92  # of JPEG
_POLICY = MediaPolicy(allow_private_hosts=True, allow_any_local_path=True, max_bytes=1 << 40)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a clip, in seconds: the frames at `moments`, each of at most `area` pixels."""

    begin: float
    end: float
    moments: tuple[float, ...]
    area: int

    @property
    def title(self) -> str:
        return f"{clock(self.begin)}-{clock(self.end)}"


@dataclass(frozen=True, slots=True)
class Shot:
    """A stretch with its frames, JPEG files."""

    stretch: Stretch
    frames: tuple[bytes, ...]

    @property
    def part(self) -> MediaPart:
        """As servers take frames that were sampled already."""
        listed = ",".join(base64.b64encode(frame).decode() for frame in self.frames)
        return MediaPart("video", f"data:video/jpeg;base64,{listed}")

    def halves(self) -> tuple[Shot, Shot]:
        """The same in two questions; only where `can_be_halved`."""
        middle = len(self.frames) // (2 * PAIR) * PAIR
        at = self.stretch.moments[middle]
        first = replace(self.stretch, end=at, moments=self.stretch.moments[:middle])
        second = replace(self.stretch, begin=at, moments=self.stretch.moments[middle:])
        return Shot(first, self.frames[:middle]), Shot(second, self.frames[middle:])

    @property
    def can_be_halved(self) -> bool:
        return len(self.frames) >= 2 * PAIR


def plan(clip: ClipFacts, *, fps: float, begin: float, end: float | None, room: int) -> list[Stretch]:
    """The parts in which a clip is asked about, `room` tokens of frames each: one part wherever that can be.

    One part is shown as finely as there is room; several at a medium fineness, or coarsely where room is scarce. Raises
    `InvalidRequest` for times that lie outside.
    """
    end = clip.seconds if end is None else min(end, clip.seconds)
    if not begin < end:
        raise InvalidRequest(f"nothing is left to watch: the video lasts {clock(clip.seconds)}", param="from")
    there = (end - begin) * (clip.fps or fps)
    frames = _even(min(max((end - begin) * fps, RULE.min_frames), there))
    for tokens in (FINE, 512, 384, MEDIUM, 192, COARSE):
        if frames <= _most_frames(clip, tokens, room):
            return [_stretch(clip, begin, end, frames, tokens)]
    tokens = MEDIUM if room >= 8 * MEDIUM else COARSE
    count = math.ceil(frames / _most_frames(clip, tokens, room))
    bounds = np.linspace(begin, end, count + 1).tolist()
    each = _even(frames / count)
    return [_stretch(clip, *pair, each, tokens) for pair in pairwise(bounds)]


def _even(frames: float) -> int:
    return max(PAIR, PAIR * round(frames / PAIR))


def _most_frames(clip: ClipFacts, tokens: int, room: int) -> int:
    """How many frames fit, when a pair of them may have `tokens` tokens (small frames have fewer)."""
    height, width = fitted(clip.height, clip.width, tokens * RULE.factor**2)
    pairs = room // (height * width // RULE.factor**2)
    in_all = RULE.video_total_pixels // (height * width)  # the models' own cap on a whole video, in pairs
    return PAIR * max(1, min(pairs, in_all, RULE.max_frames // PAIR))


def _stretch(clip: ClipFacts, begin: float, end: float, frames: int, tokens: int) -> Stretch:
    """Frames spread evenly from the first to the last, as the models were trained."""
    last = max(begin, end - 1 / (clip.fps or 25))
    return Stretch(begin, end, tuple(np.linspace(begin, last, frames).tolist()), tokens * RULE.factor**2)


def fitted(height: int, width: int, area: int) -> tuple[int, int]:
    """The height and width that a model gives to frames of at most `area` pixels."""
    return frame_size(PAIR, height, width, RULE, PixelLimits(max_pixels=area))


class Film:
    """A clip that is read part by part. A context manager: a file stays open meanwhile."""

    def __init__(self, part: MediaPart) -> None:
        source = part.source
        self._file: BinaryIO
        if isinstance(source, Path):
            try:
                self._file = source.open("rb")
            except OSError as error:
                raise InvalidRequest(f"cannot read {source}: {error.strerror}") from error
        else:
            self._file = io.BytesIO(read(source, _POLICY, expect="video"))
        try:
            self.facts = clip_facts(self._file, _POLICY)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def shots(self, stretches: Sequence[Stretch]) -> Iterator[Shot]:
        """One after the other, decoded in one go. Raises `BadMedia` where the clip is damaged."""
        self._file.seek(0)
        moments = [moment for stretch in stretches for moment in stretch.moments]
        with closing(frames_at(self._file, moments, _POLICY)) as frames:
            for stretch in stretches:
                yield Shot(stretch, tuple(_jpeg(frame, stretch.area) for frame in islice(frames, len(stretch.moments))))


def _jpeg(frame: Pixels, area: int) -> bytes:
    """A frame as the model will see it; a small one as it is."""
    height, width = fitted(frame.shape[0], frame.shape[1], area)
    if height * width < frame.shape[0] * frame.shape[1]:
        frame = resize_bicubic(frame, height, width)
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def clock(seconds: float) -> str:
    """61.5 as "1:01.5", 3600 as "1:00:00"."""
    tenths = round(seconds * 10)
    whole, rest = divmod(tenths, 10)
    hours, minutes, secs = whole // 3600, whole // 60 % 60, whole % 60
    text = f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
    return f"{text}.{rest}" if rest else text


def seconds_of(text: str) -> float:
    """From "90", "1:30" or "1:00:00.5". Raises `InvalidRequest`."""
    match = re.fullmatch(r"(?:(?:(\d{1,4}):)?(\d{1,6}):)?(\d{1,9}(?:\.\d+)?)s?", text.strip())
    if match is None:
        raise InvalidRequest(f"'{text}' is no time; write 90, 1:30 or 1:00:00")
    return int(match[1] or 0) * 3600 + int(match[2] or 0) * 60 + float(match[3])
