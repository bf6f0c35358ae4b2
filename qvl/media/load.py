"""From a media part of a message to the pixels, the grid and the digest that the engine needs.

Knows the ways to name a picture or a video. Does not know tokens, batches or devices.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl.errors import BadMedia
from qvl.media import fetch
from qvl.media.fetch import MediaPolicy
from qvl.media.given_up import turn
from qvl.media.image import Empty, decode_image, decode_later
from qvl.media.kept import DEFAULT_BYTES, Kept
from qvl.media.later import Decoding
from qvl.media.resize import resize_bicubic
from qvl.media.sizes import check_limits, frame_size, picture_size
from qvl.media.stages import reported, stage
from qvl.media.video import FrameStack, check_sampling, decode_video, sample_indices
from qvl.specs import ProcessorSpec
from qvl.types import Grid, MediaKind, MediaPart, PixelLimits

DIGEST_BYTES = 16

Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LoadedMedia:
    """One picture or video, ready for the engine.

    `pixels` is uint8 [frames, h, w, 3], C-contiguous: a picture has one frame. `height` and `width` are the size
    the model takes; where pixels have another, the device resizes. `original_size` is (h, w) of what the caller
    sent, upright.
    """

    kind: MediaKind
    pixels: Pixels
    height: int
    width: int
    grid: Grid
    digest: bytes
    original_size: tuple[int, int]
    num_tokens: int
    decoding: Decoding | None = None  # until that is over `pixels` hold anything

    @property
    def num_bytes(self) -> int:
        """Of the pixels."""
        return self.pixels.nbytes


def keep_pictures(capacity: int = DEFAULT_BYTES) -> Kept[LoadedMedia]:
    """Room for `capacity` bytes of pixels of pictures that may come again."""
    return Kept(lambda media: media.num_bytes, capacity)


class Once:
    """Stands as `MediaPart.source` for another source that is read once, for who loads the same part several times.

    Whoever counts a conversation before it is sent does. The pixels live as long as this does, or until `forget`.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.loaded: LoadedMedia | None = None

    def forget(self) -> None:
        """Give the pixels back; they are loaded again if they are asked for again."""
        self.loaded = None


@reported
def load(
    part: MediaPart,
    spec: ProcessorSpec,
    policy: MediaPolicy,
    limits: PixelLimits,
    *,
    resize_here: bool,
    gate: threading.Semaphore | None = None,
    kept: Kept[LoadedMedia] | None = None,
    empty: Empty | None = None,
    later: bool = False,
) -> LoadedMedia:
    """Read, decode, size and digest one part. `limits` fill what the part's own limits leave open.

    Where a `gate` is given, everything but waiting for the network happens within it. `kept`: pictures of the same
    `spec`, `policy` and `resize_here`, so that the same file is decoded once for several requests. `empty`: where the
    pixels of pictures shall lie that are not resized here; with `later` they may still have to come there (`Decoding`).

    No request goes above the checkpoint's `max_pixels` (a larger wish is served with the checkpoint's). With
    `resize_here` the pixels already have the model's size. Blocks on network and disk; decoding, resizing and
    hashing release the GIL. Raises BadMedia, MediaRefused, PayloadTooLarge, InvalidRequest.
    """
    once = part.source
    if isinstance(once, Once):
        if (loaded := once.loaded) is None:
            inner = replace(part, source=once.source)
            once.loaded = loaded = load(
                inner, spec, policy, limits, resize_here=resize_here, gate=gate, kept=kept, empty=empty, later=later
            )
        if loaded.decoding is not None and not later:
            loaded.decoding.finish()
        return loaded
    limits = part.limits.over(limits)
    check_limits(limits, spec)
    if part.kind == "video":
        check_sampling(limits, spec)
    if fetch.is_remote(part.source):
        data = fetch.read(part.source, policy, expect=part.kind)
        part = replace(part, source=data)
    place = None if resize_here else empty
    with nullcontext() if gate is None or _has_remote_frames(part) else turn(gate):
        loaded = _load(part, spec, policy, limits, resize_here, kept, place)
        if loaded.decoding is not None and not later:
            loaded.decoding.finish()
    return loaded


def _has_remote_frames(part: MediaPart) -> bool:
    """Whether a list of frames is still to be fetched, one by one: that is mostly waiting."""
    return isinstance(part.source, (list, tuple)) and any(fetch.is_remote(frame) for frame in part.source)


def _load(
    part: MediaPart,
    spec: ProcessorSpec,
    policy: MediaPolicy,
    limits: PixelLimits,
    resize_here: bool,
    kept: Kept[LoadedMedia] | None,
    empty: Empty | None,
) -> LoadedMedia:
    if part.kind == "video":
        pixels, size = _load_video(part.source, spec, policy, limits, resize_here)
        target = frame_size(len(pixels), *size, spec, limits)
        return _loaded("video", pixels, _content_of(pixels), size, target, spec)

    def picture(source: Any, content: bytes) -> LoadedMedia:
        if empty is not None and content:
            begun = decode_later(source, max_pixels=policy.max_image_pixels, empty=empty)
            if begun is not None:
                pixels, decode = begun
                size = (pixels.shape[0], pixels.shape[1])
                target = picture_size(*size, spec, limits)
                return _loaded("image", pixels[None], content, size, target, spec, Decoding(decode))
        pixels = decode_image(source, max_pixels=policy.max_image_pixels, empty=empty)
        size = (pixels.shape[0], pixels.shape[1])
        target = picture_size(*size, spec, limits)
        pixels = np.ascontiguousarray(resize_bicubic(pixels, *target) if resize_here else pixels)[None]
        return _loaded("image", pixels, content or _content_of(pixels), size, target, spec)

    data = _picture_file(part.source, policy)
    if data is None:
        return picture(part.source, b"")
    # What a file shows is known by its bytes: hashing them takes a tenth of the time, and need not wait for pixels.
    content = _content_of(data)
    if kept is None:
        return picture(data, content)
    return kept.get((content, limits), lambda: picture(data, content))


def _loaded(
    kind: MediaKind,
    pixels: Pixels,
    content: bytes,
    original_size: tuple[int, int],
    target: tuple[int, int],
    spec: ProcessorSpec,
    decoding: Decoding | None = None,
) -> LoadedMedia:
    height, width = target
    slices = -(-len(pixels) // spec.temporal_patch_size)  # an odd last frame is shown twice
    grid = Grid(slices, height // spec.patch_size, width // spec.patch_size)
    return LoadedMedia(
        kind=kind,
        pixels=pixels,
        height=height,
        width=width,
        grid=grid,
        digest=_digest(kind, content, target, spec),
        original_size=original_size,
        num_tokens=grid.num_tokens(spec.merge_size),
        decoding=decoding,
    )


def _picture_file(source: Any, policy: MediaPolicy, seconds: float | None = None) -> bytes | None:
    """The bytes of the file that a MediaPart may name as a picture; None where its pixels are there already."""
    if isinstance(source, (np.ndarray, Image.Image)):
        return None
    if isinstance(source, (str, bytes, bytearray, memoryview, Path)):
        return fetch.read(source, policy, expect="image", seconds=seconds)
    raise BadMedia("a picture is given as a URL, a data URL, a path, bytes, a PIL picture or a uint8 array [h, w, 3]")


def _load_video(
    source: Any, spec: ProcessorSpec, policy: MediaPolicy, limits: PixelLimits, resize_here: bool
) -> tuple[Pixels, tuple[int, int]]:
    """Any video that a MediaPart may name -> sampled frames uint8 [n, h, w, 3], and (h, w) before resizing."""

    def fit(num_frames: int, height: int, width: int) -> tuple[int, int]:
        return frame_size(num_frames, height, width, spec, limits)

    if fetch.is_frame_list(source):
        source = fetch.read_frame_list(source, policy, max_frames=spec.max_frames)
    if isinstance(source, (list, tuple, np.ndarray)):
        indices = _pick_frames(source, spec, limits)
        stack = FrameStack(len(indices), policy, fit=fit, resize_here=resize_here)
        end = time.monotonic() + policy.total_timeout
        for index in indices.tolist():
            frame = source[index]
            data = _picture_file(frame, policy, end - time.monotonic())
            stack.add(decode_image(frame if data is None else data, max_pixels=policy.max_image_pixels))
        return stack.frames(), stack.size
    if isinstance(source, (str, bytes, bytearray, memoryview, Path)):
        data = fetch.read(source, policy, expect="video")
        clip = decode_video(data, limits, spec, policy, fit=fit, resize_here=resize_here)
        return clip.frames, clip.size
    raise BadMedia(
        "a video is given as a URL, a data URL, a path, bytes, a uint8 array [n, h, w, 3] or a list of pictures"
    )


def _pick_frames(
    source: Sequence[Any] | npt.NDArray[Any], spec: ProcessorSpec, limits: PixelLimits
) -> npt.NDArray[np.int64]:
    """Indices of the frames to take: all of them, since the caller chose them, unless the request says how many."""
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise BadMedia(f"an array {list(source.shape)} is not a video; give uint8 [n, h, w, 3]")
    if len(source) == 0:
        raise BadMedia("the video has no frames")
    if limits.num_frames is not None:
        return sample_indices(len(source), spec.fps, limits, spec)
    if len(source) > spec.max_frames:
        raise BadMedia(f"the video has {len(source)} frames, at most {spec.max_frames} can be taken; set num_frames")
    return np.arange(len(source))


@stage("hash")
def _content_of(content: bytes | Pixels) -> bytes:
    """What tells this file, or these pixels of this shape, from all others. Hashed where it lies.

    By SHA-256, for which processors have instructions: a fifth of the time of BLAKE2.
    """
    if isinstance(content, bytes):
        state = hashlib.sha256(b"qvl media file")
        state.update(content)
    else:
        state = hashlib.sha256(b"qvl media pixels %r" % (content.shape,))
        state.update(content.reshape(-1).data)
    return state.digest()[:DIGEST_BYTES]


def _digest(kind: MediaKind, content: bytes, size: tuple[int, int], spec: ProcessorSpec) -> bytes:
    """Everything that the embedding depends on."""
    settings = (spec.image_mean, spec.image_std, spec.patch_size, spec.temporal_patch_size, spec.merge_size)
    state = hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=b"qvl media")
    state.update(repr((kind, size, settings)).encode())
    return state.digest()
