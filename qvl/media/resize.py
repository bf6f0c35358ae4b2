"""The size that a picture has for the model, and the bicubic resampling that takes it there.

Knows the reference's rounding rules. Does not know files, patches or devices.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl.errors import BadMedia
from qvl.media.stages import stage

MAX_RATIO = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels: multiples of `factor`, area within the limits where the shape allows it.

    The same numbers as the checkpoint's own processor in transformers, thin pictures included; a side that would
    become 0 is `factor`. Raises BadMedia for an empty picture and for sides whose ratio is above 200.
    """
    if min(height, width) < 1:
        raise BadMedia("the picture is empty")
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise BadMedia(f"the picture is {width}x{height}; the longer side may be at most {MAX_RATIO} times the shorter")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = math.floor(height / beta / factor) * factor
        new_width = math.floor(width / beta / factor) * factor
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return max(factor, new_height), max(factor, new_width)


@stage("resize")
def resize_bicubic(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """[h, w, 3] -> [height, width, 3], uint8, Pillow's antialiased bicubic (what the reference processor calls)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
