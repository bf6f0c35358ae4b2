"""From conversations to arrays: prompts in ChatML, M-RoPE positions, labels and the places that answers point at.

Also the curriculum: what a batch is made of at a given progress (0..1) of the run. Knows numpy, not torch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.demo_model import films, tasks
from tools.demo_model import phrases as ask
from tools.demo_model.fonts import FontBook
from tools.demo_model.tasks import Grid, Picture, Sample, Studio
from tools.demo_model.vocab import SPECIAL, encode

PAD, IM_START, IM_END = (SPECIAL[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
VISION_START, VISION_END = SPECIAL["<|vision_start|>"], SPECIAL["<|vision_end|>"]
IMAGE_PAD, VIDEO_PAD = SPECIAL["<|image_pad|>"], SPECIAL["<|video_pad|>"]

WORD_GRIDS: list[Grid] = [(2, 6), (2, 8), (3, 8)]
LINE_GRIDS: list[Grid] = [(3, 10), (4, 10), (5, 10), (5, 13)]
PAGE_GRIDS: list[Grid] = [
    (4, 16), (5, 13), (6, 11), (8, 8), (3, 22), (6, 14), (8, 10), (8, 12), (6, 18), (9, 12), (8, 16), (12, 12),
    (10, 14),
]  # fmt: skip
LARGE_GRIDS: list[Grid] = [(14, 10), (12, 16), (16, 16), (10, 20)]
TURN_GRIDS: list[Grid] = [(5, 13), (8, 12), (9, 12), (6, 16), (8, 8)]
TABLE_GRIDS: list[Grid] = [(6, 14), (8, 12), (7, 16), (10, 14), (9, 16), (10, 18), (12, 16)]
SEVERAL: list[list[Grid]] = [
    [(5, 13)] * 2, [(5, 13)] * 3, [(5, 13)] * 4, [(8, 8)] * 3, [(4, 16)] * 4, [(6, 14), (5, 13)], [(8, 10)] * 2,
    [(4, 16), (8, 8), (6, 11)], [(6, 11), (5, 13), (8, 8), (4, 16)],
]  # fmt: skip
CONVERSATIONS: list[list[Grid]] = [
    [(5, 13), (8, 8)], [(6, 11)] * 3, [(4, 16), (6, 14)], [(6, 11), (8, 8), (5, 13), (4, 16), (6, 14)],
    [(5, 13)] * 6, [(8, 12)] * 8, [(8, 12)] * 8,
]  # fmt: skip
FILMS: list[list[Grid]] = [
    [(8, 8)] * 3, [(6, 11)] * 4, [(7, 10)] * 2, [(8, 16)] * 3, [(10, 13)] * 4, [(11, 12)] * 3, [(9, 16)] * 2,
    [(8, 16)] * 5, [(10, 14)] * 6, [(9, 16)] * 5, [(9, 16)] * 8, [(12, 21)] * 3, [(12, 21)] * 5, [(10, 14)] * 9,
    [(13, 18)] * 4,
]  # fmt: skip

Task = Callable[[Studio, Grid], Sample]
ONE_PICTURE: list[Task] = [
    tasks.plain_reading, tasks.one_line, tasks.shape_box, tasks.word_box, tasks.describe, tasks.chinese_reading
]  # fmt: skip
SORTS = ["one", "two", "table", "several", "conversation", "video", "talk"]
# How often each of them is drawn. From LATE on, what is learnt last comes more often: shapes, films, many pictures.
USUAL = ([0.50, 0.08, 0.18, 0.12, 0.04, 0.08], [0.545, 0.1, 0.13, 0.12, 0.025, 0.07, 0.01])
LAST = ([0.28, 0.06, 0.16, 0.16, 0.26, 0.08], [0.42, 0.08, 0.09, 0.09, 0.13, 0.18, 0.01])
LATE = 0.6


@dataclass(frozen=True)
class Recipe:
    """One batch's fixed shape: sort of samples, every slot's grid; room for samples, tokens, answers, points."""

    sort: str  # "one", "two" (turns), "table", "several", "conversation", "video", "talk"
    grids: tuple[Grid, ...]
    size: int
    length: int
    rows: int
    points: int


def make_recipe(sort: str, grids: list[Grid], budget: int, largest: int = 256) -> Recipe:
    """Room for about 97 of 100 samples; longer ones are drawn again. `budget`: vision tokens per batch."""
    seen = sum(rows * columns for rows, columns in grids)
    extra, answer, points = {
        "one": (112 + min(100, 0.9 * seen), 16 + 0.3 * min(seen, 120), 16 + min(seen, 114)),
        "two": (270.0, 75.0, 16 + min(seen, 114)),
        "table": (165 + 0.65 * seen, 60 + 0.5 * seen, 20 + min(seen, 120)),
        "several": (144.0, 20.0, 100),
        "conversation": (110 + 110.0 * len(grids), 20 + 35.0 * len(grids), 50 + 30.0 * len(grids)),
        "video": (128.0, 24 + 2.5 * len(grids), 24 + 12.0 * len(grids)),
        "talk": (288.0, 130.0, 1),
    }[sort]
    size = max(8, min(largest, int(budget * (0.65 if sort == "video" else 1)) // max(seen, 48)) // 8 * 8)
    size = 32 if sort == "talk" else size
    return Recipe(sort, tuple(grids), size, -(-int(seen + extra) // 16) * 16, int(size * answer), int(points))


def level_at(progress: float) -> float:
    return max(0.0, min(1.0, (progress - 0.02) / 0.16))


def choose_recipe(rng: random.Random, progress: float, budget: int) -> Recipe:
    sort, grids = _sort_and_grids(rng, progress)
    return make_recipe(sort, grids, budget, 384 if progress < 0.09 else 256)


def _sort_and_grids(rng: random.Random, progress: float) -> tuple[str, list[Grid]]:
    if progress < 0.03:
        return "one", [rng.choice(WORD_GRIDS)]
    if progress < 0.09:
        return "one", [rng.choice(WORD_GRIDS if rng.random() < 0.2 else LINE_GRIDS)]
    sort = rng.choices(SORTS, (USUAL if progress < LATE else LAST)[1])[0]
    if sort == "one":
        return sort, [rng.choice(rng.choices([LINE_GRIDS, PAGE_GRIDS, LARGE_GRIDS], [0.08, 0.74, 0.18])[0])]
    if sort in ("two", "table"):
        return sort, [rng.choice(TURN_GRIDS if sort == "two" else TABLE_GRIDS)]
    several: dict[str, list[list[Grid]]] = {
        "several": SEVERAL,
        "conversation": CONVERSATIONS,
        "video": FILMS,
        "talk": [[]],
    }
    return sort, rng.choice(several[sort])


def make_sample(studio: Studio, recipe: Recipe, progress: float) -> Sample:
    rng, grids = studio.rng, list(recipe.grids)
    if recipe.sort == "one" and progress < 0.09:
        sample = tasks.plain_reading(studio, grids[0])
    elif recipe.sort == "one":
        task = rng.choices(ONE_PICTURE, (USUAL if progress < LATE else LAST)[0])[0]
        sample = task(studio, grids[0])
        sample.kind = task.__name__
    elif recipe.sort in ("two", "table"):
        sample = (tasks.follow_up if recipe.sort == "two" else tasks.table)(studio, grids[0])
    else:
        makers = {"several": tasks.several, "conversation": tasks.conversation, "video": films.video}
        sample = makers.get(recipe.sort, tasks.small_talk)(studio, grids)
    sample.kind = sample.kind or recipe.sort
    return _dress(rng, sample)


def _dress(rng: random.Random, sample: Sample) -> Sample:
    """Another system message now and then; small talk before or after."""
    kind = rng.random()
    sample.system = ask.SYSTEM if kind < 0.8 else rng.choice(ask.OTHER_SYSTEMS) if kind < 0.95 else None
    if sample.kind == "two" and rng.random() < 0.15:
        sample.turns.insert(rng.choice([0, len(sample.turns)]), tasks.small_talk_turn(rng))
    return sample


@dataclass
class Packed:
    """One conversation as token rows; `refs[j]` belongs to the token that position j predicts."""

    ids: list[int]
    positions: list[tuple[int, int, int]]
    labels: list[int]
    refs: list[tuple[int, int]]
    vision: list[int]  # where the vision tokens stand, in slot order


class Writer:
    """Writes a conversation token by token."""

    def __init__(self, grids: tuple[Grid, ...], loose_video: bool = False) -> None:
        self.grids, self.loose_video, self.next = grids, loose_video, 0
        self.out = Packed([], [], [], [], [])

    def tokens(self, ids: list[int]) -> None:
        self._put(ids, [(n, n, n) for n in range(self.next, self.next + len(ids))])
        self.next += len(ids)

    def _put(self, ids: list[int], positions: list[tuple[int, int, int]]) -> None:
        self.out.ids += ids
        self.out.positions += positions
        self.out.labels += [-100] * len(ids)
        self.out.refs += [tasks.NOWHERE] * len(ids)

    def picture(self, picture: Picture) -> None:
        self.tokens([VISION_START])
        rows, columns = self.grids[picture.slots[0]]
        start, first = self.next, len(self.out.ids)
        pad = [VIDEO_PAD if picture.video else IMAGE_PAD] * (rows * columns)
        across = range(start, start + columns)
        for step in range(start, start + len(picture.slots)):
            self._put(pad, [(step, row, column) for row in range(start, start + rows) for column in across])
        self.out.vision += range(first, len(self.out.ids))
        steps = 1 if self.loose_video else len(picture.slots)
        self.next = start + max(steps, rows, columns)
        self.tokens([VISION_END])

    def answer(self, answer: tasks.Answer) -> None:
        for token, ref in [*answer, (IM_END, tasks.NOWHERE)]:
            self.out.labels[-1], self.out.refs[-1] = token, ref
            self.tokens([token])
        self.tokens(encode("\n"))


def write(sample: Sample, grids: tuple[Grid, ...], loose_video: bool = False) -> Packed:
    """The chat template, token by token. `loose_video`: positions of transformers >= 5.4 after a video."""
    writer, pictures, videos = Writer(grids, loose_video), 0, 0
    if sample.system is not None:
        writer.tokens([IM_START, *encode(f"system\n{sample.system}"), IM_END, *encode("\n")])
    for turn in sample.turns:
        writer.tokens([IM_START, *encode("user\n")])
        for part in turn.parts:
            if isinstance(part, str):
                writer.tokens(encode(part))
                continue
            pictures, videos = pictures + (not part.video), videos + part.video
            if sample.vision_id:
                writer.tokens(encode(f"Video {videos}: " if part.video else f"Picture {pictures}: "))
            writer.picture(part)
        writer.tokens([IM_END, *encode("\n"), IM_START, *encode("assistant\n")])
        writer.answer(turn.answer)
    return writer.out


def pack_batch(packed: list[Packed], samples: list[Sample], recipe: Recipe) -> dict[str, Any]:
    """Everything but pixels, in the recipe's fixed shapes; `rows`: flat positions that predict an answer token."""
    count = len(samples)
    ids = np.full((count, recipe.length), PAD, np.int16)
    labels = np.full((count, recipe.length), -100, np.int16)
    positions = np.zeros((3, count, recipe.length), np.int16)
    refs = np.full((count, recipe.length), -1, np.int16)
    vision = np.zeros((count, len(packed[0].vision)), np.int16)
    points, offsets = _points(samples, recipe)
    for n, row in enumerate(packed):
        end = len(row.ids)
        ids[n, :end], labels[n, :end] = row.ids, row.labels
        positions[:, n, :end] = np.array(row.positions, np.int16).T
        refs[n, :end] = [-1 if slot < 0 else offsets[n][slot] + point for slot, point in row.refs]
        vision[n] = row.vision
    found = np.flatnonzero(labels.reshape(-1) >= 0)[: recipe.rows]
    rows, row_labels = np.zeros(recipe.rows, np.int64), np.full(recipe.rows, -100, np.int64)
    rows[: len(found)], row_labels[: len(found)] = found, labels.reshape(-1)[found]
    steady = np.array([sample.steady for sample in samples])
    return {
        "recipe": recipe, "ids": ids, "positions": positions, "refs": refs, "vision": vision, "points": points,
        "steady": steady, "rows": rows, "row_labels": row_labels,
    }  # fmt: skip


def count_points(sample: Sample) -> int:
    return sum(len(page.points) for pages in sample.frames for page in pages)


def _points(samples: list[Sample], recipe: Recipe) -> tuple[np.ndarray, list[list[int]]]:
    """[n, points, 4] rows of (slot, x, y, class), slot -1 where unused; and each slot's first row."""
    points, offsets = np.full((len(samples), recipe.points, 4), -1, np.float32), []
    for n, sample in enumerate(samples):
        row: list[tuple[float, float, float, int]] = []
        starts = []
        for slot in range(len(recipe.grids)):
            starts.append(len(row))
            for page in sample.frames[slot]:
                row.extend((slot, x, y, kind) for x, y, kind in page.points)
        if row:
            points[n, : len(row)] = row
        offsets.append(starts)
    return points, offsets


def pixel_bytes(recipe: Recipe) -> int:
    frames = 2 if recipe.sort == "video" else 1
    return recipe.size * frames * sum(rows * columns for rows, columns in recipe.grids) * 28 * 28 * 3


def fill_pixels(samples: list[Sample], recipe: Recipe, buffer: np.ndarray) -> None:
    """Raw uint8 RGB, slot after slot: [size, frames, height, width, 3] each (frames: 2 for a video, else 1)."""
    start, frames = 0, 2 if recipe.sort == "video" else 1
    for slot, (rows, columns) in enumerate(recipe.grids):
        shape = (recipe.size, frames, rows * 28, columns * 28, 3)
        count = int(np.prod(shape))
        view = buffer[start : start + count].reshape(shape)
        for n, sample in enumerate(samples):
            pages = sample.frames[slot]
            for frame in range(frames):
                view[n, frame] = np.asarray(pages[min(frame, len(pages) - 1)].image)
        start += count


def make_batch(
    seed: int, index: int, book: FontBook, progress: float, budget: int
) -> tuple[dict[str, Any], list[Sample]]:
    """Batch number `index` of the stream `seed`: the same arguments draw the same batch."""
    rng = random.Random(f"{seed}/{index}")
    recipe = choose_recipe(rng, progress, budget)
    studio = Studio(rng, book, level_at(progress))
    samples: list[Sample] = []
    packed: list[Packed] = []
    while len(samples) < recipe.size:
        sample = make_sample(studio, recipe, progress)
        row = write(sample, recipe.grids, recipe.sort == "video" and rng.random() < 0.3)
        if len(row.ids) <= recipe.length and count_points(sample) <= recipe.points:
            samples.append(sample)
            packed.append(row)
    return pack_batch(packed, samples, recipe), samples
