"""Small videos whose every frame says its own number by two greys: sixteens on the left, ones on the right."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

STEP = 15  # grey levels between two numbers, well above what coding loses


def clip(
    frames: int, fps: int = 10, *, size: tuple[int, int] = (64, 48), container: str = "mp4", start: int = 0
) -> bytes:
    """`frames` frames (256 at most tell their numbers), a key frame every ten; their times begin at frame `start`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream("libx264" if container != "avi" else "mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = 10
        if container != "avi":
            stream.options = {"crf": "5", "preset": "ultrafast"}
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), number // 16 % 16 * STEP, np.uint8)
            picture[:, size[0] // 2 :] = number % 16 * STEP
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = start + number, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def number_of(frame: np.ndarray) -> int:
    """Which frame this is."""
    middle = frame.shape[1] // 2
    return 16 * round(float(frame[:, : middle - 4].mean()) / STEP) + round(float(frame[:, middle + 4 :].mean()) / STEP)
