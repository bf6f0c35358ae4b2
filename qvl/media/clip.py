"""A clip by its time: how long it is, and the frames that are shown at given moments, however long the file.

The file is read as it is needed and decoded as a stream. Knows no model and caps no length: `qvl.media.video` decodes
what strangers send.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

from qvl.errors import BadMedia
from qvl.media.fetch import MediaPolicy
from qvl.media.video import Pixels, open_video, upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_EARLY = 1e-3  # seconds: a frame that begins so little after a moment counts as shown
_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Length in seconds, frames in a second (0 where nothing says), and the size of a frame as it is stored."""

    seconds: float
    fps: float
    height: int
    width: int


def clip_facts(source: bytes | BinaryIO, policy: MediaPolicy) -> ClipFacts:
    """What a clip's headers say; where they are silent its packets are counted. Raises `BadMedia`."""
    import av

    try:
        container, stream = open_video(source, policy)
        with container:
            height, width = stream.codec_context.height, stream.codec_context.width
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            seconds = _length_told(container, stream) or _length_counted(container, stream, fps)
    except (av.FFmpegError, OSError, ValueError, EOFError, ArithmeticError):
        raise BadMedia("the video is damaged or in a format that cannot be decoded") from None
    if seconds <= 0:
        raise BadMedia("the video has no frames")
    return ClipFacts(seconds, fps, height, width)


def frames_at(source: bytes | BinaryIO, moments: Sequence[float], policy: MediaPolicy) -> Generator[Pixels, None, None]:
    """The frame on screen at each of the ascending `moments` (seconds from the clip's beginning), uint8 [h, w, 3].

    After the last frame it stays on screen. Raises `BadMedia`, at the place of the damage.
    """
    import av

    try:
        container, stream = open_video(source, policy)
        with container:
            yield from _shown(container, stream, moments, policy)
    except (av.FFmpegError, OSError, ValueError, EOFError, ArithmeticError, MemoryError):
        raise BadMedia("the video is damaged or in a format that cannot be decoded") from None


def _length_told(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / _MICROSECONDS if container.duration else 0.0


def _length_counted(container: InputContainer, stream: VideoStream, fps: float) -> float:
    """To the end of the last packet; where packets tell no time, as long as so many frames last."""
    count, end, first = 0, Fraction(0), stream.start_time or 0
    for packet in container.demux(stream):
        count += packet.size > 0
        if packet.pts is not None and stream.time_base:
            end = max(end, (packet.pts - first + (packet.duration or 0)) * stream.time_base)
    return float(end) or (count / fps if fps else 0.0)


def _shown(
    container: InputContainer, stream: VideoStream, moments: Sequence[float], policy: MediaPolicy
) -> Generator[Pixels, None, None]:
    start = float((stream.start_time or 0) * (stream.time_base or 0))
    if moments and moments[0] > 1 and stream.time_base:
        container.seek(int((moments[0] + start) / stream.time_base), stream=stream)  # to a key frame before it
    step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    waiting = iter(moments)
    moment = next(waiting, None)
    shown: VideoFrame | None = None
    pixels: Pixels | None = None
    for number, frame in enumerate(container.decode(stream)):
        if frame.width * frame.height > policy.max_frame_pixels:
            raise BadMedia(f"the frames of the video have more than {policy.max_frame_pixels} pixels")
        begins = frame.time - start if frame.time is not None else number * step
        while moment is not None and shown is not None and begins > moment + _EARLY:
            pixels = upright(shown) if pixels is None else pixels
            yield pixels
            moment = next(waiting, None)
        if moment is None:
            return
        shown, pixels = frame, None
    if shown is None:
        raise BadMedia("the video has no frames" if not moments or moments[0] <= 1 else "the video ends before that")
    while moment is not None:
        pixels = upright(shown) if pixels is None else pixels
        yield pixels
        moment = next(waiting, None)
