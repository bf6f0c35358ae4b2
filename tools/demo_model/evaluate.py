"""Quick scores while training: given the right answer so far, how often is the next token right, on held-out fonts.

Stricter, free-running scores come from score.py.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tools.demo_model import films, pack, tasks
from tools.demo_model.feed import Batch, to_device
from tools.demo_model.fonts import FontBook
from tools.demo_model.losses import prepare
from tools.demo_model.model import DemoModel
from tools.demo_model.tasks import Studio

SETS: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [
    ("read", "one", ((9, 12),)), ("line", "one", ((8, 12),)), ("chinese", "one", ((8, 12),)),
    ("two", "two", ((8, 12),)), ("table", "table", ((9, 16),)), ("shape", "one", ((10, 12),)),
    ("word", "one", ((9, 12),)), ("describe", "one", ((10, 12),)), ("several", "several", ((5, 13),) * 3),
    ("video", "video", ((8, 16),) * 3), ("long video", "video", ((8, 16),) * 6),
]  # fmt: skip
MAKERS = {
    "read": tasks.plain_reading, "line": tasks.one_line, "chinese": tasks.chinese_reading, "two": tasks.follow_up,
    "table": tasks.table, "describe": tasks.describe, "shape": tasks.shape_box, "word": tasks.word_box,
}  # fmt: skip


def held_out_batches(fonts: Path, size: int, device: torch.device) -> dict[str, Batch]:
    book, batches = FontBook(fonts, "held_out"), {}
    for name, sort, grids in SETS:
        rng = random.Random(name)
        recipe = replace(pack.make_recipe(sort, list(grids), 0), size=size, rows=size * 200, length=960, points=200)
        samples = [_draw(name, Studio(rng, book), grids) for _ in range(size)]
        pixels = np.zeros(pack.pixel_bytes(recipe), np.uint8)
        pack.fill_pixels(samples, recipe, pixels)
        batches[name] = to_device(
            pack.pack_batch([pack.write(sample, grids) for sample in samples], samples, recipe), pixels, device
        )
    return batches


def _draw(name: str, studio: Studio, grids: tuple[tuple[int, int], ...]) -> tasks.Sample:
    if name in MAKERS:
        return MAKERS[name](studio, grids[0])
    return (tasks.several if name == "several" else films.video)(studio, list(grids))


def teacher_forced(model: DemoModel, tests: dict[str, Batch], dtype: torch.dtype) -> str:
    """`name tokens-right/whole-conversations-right` for each set. Gradients stay on: the compiled code is the same."""
    found = []
    for name, batch in tests.items():
        with torch.no_grad():
            ready, arrays = prepare(batch, dtype, 0.0), batch.arrays
        if ready is None:
            continue
        features = model.see(ready.patches)
        hidden, _ = model.decode(model.embed(arrays["ids"], features, arrays["vision"]).to(dtype), arrays["positions"])
        labels, rows = arrays["row_labels"], arrays["rows"]
        wrong = (model.logits(hidden.flatten(0, 1)[rows]).argmax(-1) != labels) & (labels >= 0)
        tokens = 1 - wrong.sum() / (labels >= 0).sum()
        whole = 1 - rows[wrong].div(batch.recipe.length, rounding_mode="floor").unique().numel() / batch.recipe.size
        found.append(f"{name} {100 * float(tokens):.1f}/{100 * whole:.0f}")
    return " ".join(found)
