"""What is asked: texts of common words, photograph-like JPEGs, and the JSON bodies that carry them, all from a seed.

Knows how requests are written so that a server cannot answer one from another. Does not know where they go.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from qvl.bench.load.cases import Load

# Each is one token with the space before it in Qwen's vocabulary (and in most others of that size).
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music market sense nation plan college"
).split()


def bodies(load: Load, indices: range, options: Mapping[str, Any], words_per_request: int) -> Iterator[bytes]:
    """The JSON body of each request in `indices`; `options` are its further fields, where null takes a field away."""
    shared = _picture_parts(load, _number(load.key)) if load.same_picture else None
    for index in indices:
        seed = _number(f"{load.key}/{index}")
        parts = shared if shared is not None else _picture_parts(load, seed)
        text = {"type": "text", "text": words(words_per_request, seed)}
        body = {
            "messages": [{"role": "user", "content": [*parts, text] if parts else text["text"]}],
            "max_tokens": load.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        yield msgspec.json.encode({name: value for name, value in body.items() if value is not None})


def words(count: int, seed: int) -> str:
    """`count` common words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def picture(width: int, height: int, seed: int) -> bytes:
    """A JPEG with what codecs and caches see in photographs: light that changes slowly, objects with edges, texture and
    grain. About 190 kB at 1024x1024. No two seeds share one.
    """
    rng = np.random.default_rng(seed)
    canvas = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(canvas)
    for x, y, w, h in rng.uniform(0.0, 1.0, (32, 4)):
        box = [int(x * width), int(y * height), int((x + 0.02 + w / 5) * width), int((y + 0.02 + h / 5) * height)]
        color = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if w < h else draw.rectangle)(box, fill=color)
        draw.text((box[0], box[1]), str(rng.integers(1_000_000)), fill=(0, 0, 0))
    texture = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1), dtype=np.uint8))
    waves = np.asarray(texture.resize((width, height), Image.Resampling.BILINEAR), np.int16) // 16 - 8
    grain = rng.integers(-4, 5, (height, width), dtype=np.int16) + waves
    pixels = (np.asarray(canvas).astype(np.int16) + grain[..., None]).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _number(key: str) -> int:
    return random.Random(key).getrandbits(60)


def _picture_parts(load: Load, seed: int) -> list[dict[str, Any]]:
    drawn = (picture(load.width, load.height, seed + k) for k in range(load.pictures))
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"}}
        for jpeg in drawn
    ]
