"""The pixels behind a part, and the size at which a model sees them. Knows no task."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl.media.fetch import MediaPolicy, read
from qvl.media.image import decode_image
from qvl.media.resize import resize_bicubic
from qvl.media.sizes import picture_size
from qvl.types import MediaPart, PictureRule, PixelLimits

Pixels: TypeAlias = npt.NDArray[np.uint8]

# What stands behind a part is the person's own file, or was fetched for him already.
_POLICY = MediaPolicy(allow_private_hosts=True, allow_any_local_path=True)


def pixels_of(part: MediaPart) -> Pixels:
    """uint8 [h, w, 3], upright, on white. Raises `QvlError`s for what is no picture."""
    source = part.source
    if not isinstance(source, np.ndarray | Image.Image):
        source = read(source, _POLICY, expect="image")
    return decode_image(source, max_pixels=_POLICY.max_image_pixels)


def size_seen(pixels: Pixels, rule: PictureRule) -> tuple[int, int]:
    """Width and height at which a model with this rule sees a picture."""
    height, width = picture_size(pixels.shape[0], pixels.shape[1], rule, PixelLimits())
    return width, height


def as_seen(pixels: Pixels, rule: PictureRule) -> Pixels:
    """The picture at the size at which a model with this rule sees it."""
    width, height = size_seen(pixels, rule)
    return resize_bicubic(pixels, height, width)
