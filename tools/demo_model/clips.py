"""Video files: words encoded as H.264, and frames sampled from any file as Qwen2-VL samples them. Knows PyAV."""

import io
import random
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tools.demo_model import words
from tools.demo_model.draw import HELD_OUT_COLORS, Page, clip, font_of_height, length
from tools.demo_model.fonts import FontBook
from tools.demo_model.held_out import HEIGHTS

RATE = 10  # encoded frames in a second
SIZES = [(320, 240), (360, 200), (300, 260), (640, 360)]


def video_frames(source: Path | io.BytesIO, fps: float = 2.0) -> list[Image.Image]:
    """Frames at `fps`, evenly spread, an even number of them."""
    with av.open(str(source) if isinstance(source, Path) else source) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate or RATE)
    count = max(4, round(len(frames) / rate * fps / 2) * 2)
    return [frames[round(index)] for index in np.linspace(0, len(frames) - 1, count)]


def encode(frames: list[Image.Image], quality: int) -> io.BytesIO:
    """An MP4 file of H.264; `quality` is the encoder's rate factor (18 fine, 32 coarse)."""
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": str(quality)})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    data.seek(0)
    return data


def word_clip(rng: random.Random, book: FontBook) -> tuple[list[Image.Image], list[str]]:
    """What is sampled from a file with two to four words, each on screen for 1 to 2.4 seconds; and the words."""
    ink, paper = rng.choice([((25, 25, 25), (255, 255, 255)), *HELD_OUT_COLORS])
    width, height = rng.choice(SIZES)
    scale = 1.5 if width > 400 else 1.0  # such frames are made smaller for the model
    font = font_of_height(book.pick(rng), scale * rng.choice(HEIGHTS))
    frames: list[Image.Image] = []
    shown: list[str] = []
    for _ in range(rng.randint(2, 4)):
        text = clip(words.short(rng, 9), font, width - 30)
        if shown and text == shown[-1]:
            continue
        page = Page(Image.new("RGB", (width, height), paper), ink)
        page.text((width - length(font, text)) / 2, height / 2, text, font)
        frames += [page.image] * rng.randint(RATE, 24 * RATE // 10)
        shown.append(text)
    return video_frames(encode(frames, rng.randint(18, 32))), shown
