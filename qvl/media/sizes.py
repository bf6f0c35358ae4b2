"""Which size a picture or a frame of a video has for the model.

Knows how what a request asks for combines with the checkpoint's bounds. Does not know pixels.
"""

from __future__ import annotations

from qvl.errors import InvalidRequest
from qvl.media.resize import smart_resize
from qvl.specs import ProcessorSpec
from qvl.types import PictureRule, PixelLimits


def picture_size(height: int, width: int, spec: ProcessorSpec | PictureRule, limits: PixelLimits) -> tuple[int, int]:
    """Height and width in pixels that a picture of `height` x `width` has for the model."""
    height, width = _wanted_size(height, width, limits)
    low, high = _bounds(limits, spec.min_pixels, spec.max_pixels, spec.max_pixels)
    return smart_resize(height, width, factor=spec.factor, min_pixels=low, max_pixels=high)


def frame_size(num_frames: int, height: int, width: int, spec: ProcessorSpec, limits: PixelLimits) -> tuple[int, int]:
    """Height and width in pixels of each frame for the model: the more frames, the smaller they are."""
    height, width = _wanted_size(height, width, limits)
    total = min(limits.total_pixels or spec.video_total_pixels, spec.video_total_pixels)
    share = total / max(num_frames, 1) * spec.temporal_patch_size
    most = int(max(min(spec.video_max_pixels, share), spec.video_min_pixels * 1.05))
    low, high = _bounds(limits, spec.video_min_pixels, most, max(spec.video_max_pixels, most))
    return smart_resize(height, width, factor=spec.factor, min_pixels=min(low, high), max_pixels=high)


def _wanted_size(height: int, width: int, limits: PixelLimits) -> tuple[int, int]:
    """The size that the request asks for, else the picture's own; both are then fitted to the model's bounds."""
    if limits.resized_height is None or limits.resized_width is None:
        return height, width
    return limits.resized_height, limits.resized_width


def _bounds(limits: PixelLimits, low: int, high: int, cap: int) -> tuple[int, int]:
    """The request's area bounds within the checkpoint's: one given alone moves the other out of its way."""
    if limits.min_pixels is not None and limits.min_pixels > cap:
        raise InvalidRequest(f"min_pixels may be at most {cap}", param="min_pixels")
    if limits.max_pixels is not None:
        high = min(high, limits.max_pixels)
    low = min(low, high) if limits.min_pixels is None else limits.min_pixels
    return low, high


def check_limits(limits: PixelLimits, spec: ProcessorSpec) -> None:
    """Refuse, by the field's name, what could not act."""
    smallest = spec.factor**2
    if limits.min_pixels is not None and limits.min_pixels < 1:
        raise InvalidRequest("min_pixels must be at least 1", param="min_pixels")
    if limits.max_pixels is not None and limits.max_pixels < smallest:
        raise InvalidRequest(f"max_pixels must be at least {smallest}", param="max_pixels")
    if limits.min_pixels is not None and limits.max_pixels is not None and limits.min_pixels > limits.max_pixels:
        raise InvalidRequest("min_pixels is larger than max_pixels", param="min_pixels")
    if limits.total_pixels is not None and limits.total_pixels < smallest:
        raise InvalidRequest(f"total_pixels must be at least {smallest}", param="total_pixels")
    if (limits.resized_height is None) != (limits.resized_width is None):
        raise InvalidRequest("resized_height and resized_width go together", param="resized_height")
    if limits.resized_height is not None and min(limits.resized_height, limits.resized_width or 0) < 1:
        raise InvalidRequest("resized_height and resized_width must be at least 1", param="resized_height")
