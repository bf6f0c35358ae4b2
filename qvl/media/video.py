"""Sampled frames of a video, decoded as a stream: one decoded frame is held at a time, beside those that are kept.

Knows PyAV, which frames the reference samples, and the caps that keep a hostile file small. Does not know
addresses or the model's sizes (a function that is handed in says those). FFmpeg may open neither files nor
addresses from here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from qvl.errors import BadMedia, InvalidRequest
from qvl.media.fetch import MediaPolicy
from qvl.media.resize import resize_bicubic
from qvl.media.stages import stage
from qvl.specs import ProcessorSpec
from qvl.types import PixelLimits

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Pixels: TypeAlias = npt.NDArray[np.uint8]
Fit: TypeAlias = Callable[
    [int, int, int], tuple[int, int]
]  # frames, height, width -> the height and width for the model

FRAME_FACTOR = 2
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,h264,hevc,ivf,mpegvideo,m4v"
_CODECS = (
    "h264,hevc,av1,libdav1d,libaom-av1,vp8,vp9,libvpx,libvpx-vp9,mpeg4,mpeg1video,mpeg2video,mjpeg,gif,apng,png,"
    "msmpeg4,msmpeg4v2,h263,flv,wmv1,wmv2,wmv3,vc1,theora,prores,dnxhd,rawvideo,ffv1"
)
_LIBRARY_LIMIT = "max_pixels"  # FFmpeg's own check, before it makes room for a frame
_DECODE_THREADS = 4
_PASSES = 2
_PLAUSIBLE_FPS = 1000.0  # containers without a frame rate report their clock (90,000)


@dataclass(frozen=True, slots=True)
class Clip:
    """Sampled frames: uint8 [n, h, w, 3], how many of them pass in a second, and (h, w) before any resizing."""

    frames: Pixels
    fps: float
    size: tuple[int, int]


def sample_indices(total: int, native_fps: float, limits: PixelLimits, spec: ProcessorSpec) -> npt.NDArray[np.int64]:
    """Which of `total` frames the model sees: int64 [n], ascending, n even (1 for a single frame).

    `limits.num_frames`, else as many as pass at `limits.fps` (else the checkpoint's) within its minimum and
    maximum, spread evenly from the first frame to the last.
    """
    check_sampling(limits, spec)
    if total < FRAME_FACTOR:
        return np.zeros(total, dtype=np.int64)
    most = min(spec.max_frames, total) // FRAME_FACTOR * FRAME_FACTOR
    if limits.num_frames is not None:
        count = float(limits.num_frames)
    else:
        least = math.ceil(spec.min_frames / FRAME_FACTOR) * FRAME_FACTOR
        count = max(total / native_fps * (limits.fps or spec.fps), least)
    count = max(FRAME_FACTOR, round(min(count, most) / FRAME_FACTOR) * FRAME_FACTOR)
    return np.rint(np.linspace(0, total - 1, int(count))).astype(np.int64)


def check_sampling(limits: PixelLimits, spec: ProcessorSpec) -> None:
    """InvalidRequest for an fps or a number of frames that cannot act."""
    if limits.fps is not None and not (math.isfinite(limits.fps) and limits.fps > 0):
        raise InvalidRequest("fps must be a finite number above 0", param="fps")
    if limits.num_frames is not None and not 1 <= limits.num_frames <= spec.max_frames:
        raise InvalidRequest(f"num_frames must be from 1 to {spec.max_frames}", param="num_frames")


@stage("decode")
def decode_video(
    data: bytes, limits: PixelLimits, spec: ProcessorSpec, policy: MediaPolicy, *, fit: Fit, resize_here: bool
) -> Clip:
    """The sampled frames of a video file, upright. Raises BadMedia when it is broken or above a cap of `policy`.

    With `resize_here` each frame is bicubic-resized as `fit` says while it is decoded; so it is, whatever the
    caller wants, when the frames as they are would take more than `policy.max_video_bytes`.
    """
    import av  # half a second of loading, for those who send videos

    if not data:
        raise BadMedia("the video has 0 bytes")
    try:
        total, native_fps = _probe(data, policy)
        native_fps = native_fps or spec.fps
        for _ in range(_PASSES):
            indices = sample_indices(total, native_fps, limits, spec)
            stack = FrameStack(len(indices), policy, fit=fit, resize_here=resize_here)
            seen = _collect(data, indices, stack, policy)
            if seen == 0:
                raise BadMedia("the video has no frames")
            if seen == total:
                return Clip(stack.frames(), native_fps * len(indices) / total, stack.size)
            total = seen  # packets are not always frames: sample again, from the true number
        raise BadMedia("the video has another number of frames each time it is decoded")
    except (av.FFmpegError, OSError, ValueError, EOFError, ArithmeticError, MemoryError):
        raise BadMedia(
            "the video is damaged, in a format that cannot be decoded, or has frames of more than "
            f"{policy.max_frame_pixels} pixels"
        ) from None


class FrameStack:
    """Room for `count` frames of one size, checked against the policy before it is taken."""

    def __init__(self, count: int, policy: MediaPolicy, *, fit: Fit, resize_here: bool) -> None:
        self._count = count
        self._policy = policy
        self._fit = fit
        self._resize_here = resize_here
        self._room: Pixels | None = None
        self._filled = 0
        self.size = (0, 0)

    def add(self, frame: Pixels) -> None:
        """Take one more frame, uint8 [h, w, 3]; it is copied."""
        if self._room is None:
            self._room = self._make_room(frame.shape[0], frame.shape[1])
        elif frame.shape[:2] != self.size:
            raise BadMedia("the frames of a video must all have the same size")
        if frame.shape[:2] != self._room.shape[1:3]:
            frame = resize_bicubic(frame, self._room.shape[1], self._room.shape[2])
        self._room[self._filled] = frame
        self._filled += 1

    def frames(self) -> Pixels:
        """uint8 [count, h, w, 3]."""
        assert self._room is not None, "no frame was added"
        assert self._filled == self._count, "every sampled frame was added"
        return self._room

    def _make_room(self, height: int, width: int) -> Pixels:
        most = self._policy.max_video_bytes
        self.size = (height, width)
        if self._resize_here or self._count * height * width * 3 > most:
            height, width = self._fit(self._count, height, width)
        if self._count * height * width * 3 > most:
            raise BadMedia(
                f"the {self._count} sampled frames take more than {most} bytes; ask for fewer or smaller ones"
            )
        return np.empty((self._count, height, width, 3), dtype=np.uint8)


def _refuse_io(url: str, flags: int, options: dict[str, str]) -> Any:
    raise OSError("a video may not refer to other files")


def open_video(source: bytes | BinaryIO, policy: MediaPolicy) -> tuple[InputContainer, VideoStream]:
    """Open a file, in memory or on disk. Playlists and other formats that name further files are not among the
    containers."""
    import av

    options = {
        "format_whitelist": _CONTAINERS,
        "codec_whitelist": _CODECS,
        "protocol_whitelist": "none",
        _LIBRARY_LIMIT: str(policy.max_frame_pixels),
    }
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    container = av.open(file, mode="r", options=options, io_open=_refuse_io)
    try:
        if not container.streams.video:
            raise BadMedia("the file has no video in it")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None or context.name not in _CODECS.split(","):
            raise BadMedia("the video is in a format that cannot be decoded")
        _check(1, context.width, context.height, policy)
        context.options = {_LIBRARY_LIMIT: str(policy.max_frame_pixels)}
        context.thread_count = _DECODE_THREADS
        stream.thread_type = "AUTO"
    except BaseException:
        container.close()
        raise
    return container, stream


def _probe(data: bytes, policy: MediaPolicy) -> tuple[int, float | None]:
    """Packets of the video, counted (headers lie, or do not say), and frames in a second, None where nothing says."""
    container, stream = open_video(data, policy)
    with container:
        total = 0
        for packet in container.demux(stream):
            total += packet.size > 0 and not packet.is_discard
            _check(total, stream.codec_context.width, stream.codec_context.height, policy)
        for rate in (stream.average_rate, stream.guessed_rate):
            if rate and 0 < float(rate) <= _PLAUSIBLE_FPS:
                return total, float(rate)
        if stream.duration and stream.time_base and stream.duration > 0:
            return total, total / float(stream.duration * stream.time_base)
        return total, None


def _check(count: int, width: int, height: int, policy: MediaPolicy) -> None:
    """The caps on `count` frames of this size: each of them, their number, and the work of decoding them all."""
    if width * height > policy.max_frame_pixels:
        raise BadMedia(f"the frames of the video have more than {policy.max_frame_pixels} pixels")
    if count > policy.max_video_frames:
        raise BadMedia(f"the video has more than {policy.max_video_frames} frames")
    if count * width * height > policy.max_video_pixels:
        raise BadMedia(
            f"the video has more than {policy.max_video_pixels} pixels in all its frames; send a shorter one"
        )


def _collect(data: bytes, indices: npt.NDArray[np.int64], stack: FrameStack, policy: MediaPolicy) -> int:
    """Decode the whole video, keep the wanted frames; the number of frames there were (fewer may have been kept)."""
    container, stream = open_video(data, policy)
    with container:
        wanted = iter(indices.tolist())
        next_wanted = next(wanted, -1)
        seen = 0
        for frame in _decode(container, stream, policy):
            if seen == next_wanted:
                stack.add(upright(frame))
                next_wanted = next(wanted, -1)
            seen += 1
    return seen


def _decode(container: InputContainer, stream: VideoStream, policy: MediaPolicy) -> Iterator[VideoFrame]:
    for count, frame in enumerate(container.decode(stream), start=1):
        _check(count, frame.width, frame.height, policy)
        yield frame


def upright(frame: VideoFrame) -> Pixels:
    """RGB [h, w, 3], turned as the camera says."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    quarters = round(frame.rotation / 90) % 4
    return np.rot90(pixels, quarters) if quarters else pixels
