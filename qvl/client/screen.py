"""A picture of this machine's screen, or of a region of it, as a medium like any other.

Pillow takes it, by means that differ from system to system. Knows no server.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qvl.errors import InvalidRequest
from qvl.types import MediaPart

if TYPE_CHECKING:
    from PIL import Image

NAME = "screen:"  # where a command takes a file; `screen:left,top,right,bottom` is a region
_BOX = re.compile(r"\s*(\d{1,6}),\s*(\d{1,6}),\s*(\d{1,6}),\s*(\d{1,6})\s*")


def screenshot(box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The screen as it is now, RGB; or a region: left, top, right, bottom in pixels.

    Raises `InvalidRequest` for an empty region, one that lies outside, and where no screen can be seen.
    """
    from PIL import ImageGrab

    try:
        shown = ImageGrab.grab().convert("RGB")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"no screen can be seen from here: {error}") from error
    if box is None:
        return shown
    left, top, right, bottom = box
    if not (0 <= left < right <= shown.width and 0 <= top < bottom <= shown.height):
        raise InvalidRequest(
            f"{left},{top},{right},{bottom} is no region (left,top,right,bottom) of a screen of "
            f"{shown.width} x {shown.height} pixels"
        )
    return shown.crop(box)


def screen_part(name: str) -> MediaPart | None:
    """The part for `screen:` or `screen:left,top,right,bottom`, taken now; None for any other name.

    Raises `InvalidRequest` as `screenshot` does.
    """
    if not name.startswith(NAME):
        return None
    region = name.removeprefix(NAME)
    match = _BOX.fullmatch(region)
    if region and match is None:
        raise InvalidRequest(f"'{name}' names no region; write screen: or screen:left,top,right,bottom")
    return MediaPart(
        "image", screenshot((int(match[1]), int(match[2]), int(match[3]), int(match[4])) if match else None)
    )
