"""From conversations to arrays: prompts in ChatML, M-RoPE positions, labels and the places that answers point at.

Also the curriculum: what a batch is made of at a given progress (0..1) of the run. Knows numpy, not torch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.demo_model import phrases as ask
from tools.demo_model import tasks
from tools.demo_model.fonts import FontBook
from tools.demo_model.tasks import Grid, Picture, Sample, Studio
from tools.demo_model.vocab import SPECIAL, encode

PAD, IM_START, IM_END = (SPECIAL[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
VISION_START, VISION_END = SPECIAL["<|vision_start|>"], SPECIAL["<|vision_end|>"]
IMAGE_PAD, VIDEO_PAD = SPECIAL["<|image_pad|>"], SPECIAL["<|video_pad|>"]

WORD_GRIDS: list[Grid] = [(2, 6), (2, 8), (3, 8), (2, 10)]
LINE_GRIDS: list[Grid] = [(3, 10), (3, 12), (4, 10), (4, 13), (4, 16), (5, 10), (5, 13), (6, 9)]
PAGE_GRIDS: list[Grid] = [
    (4, 16), (5, 13), (6, 11), (8, 8), (3, 22), (6, 14), (8, 10), (7, 12), (8, 12), (6, 18), (9, 12), (8, 16),
    (10, 12), (12, 12), (10, 14), (9, 16), (14, 10), (12, 16), (10, 18), (12, 14), (7, 16), (11, 9),
]  # fmt: skip
LARGE_GRIDS: list[Grid] = [(16, 12), (14, 16), (12, 20), (16, 16), (8, 22), (10, 20)]
TABLE_GRIDS: list[Grid] = [
    (8, 14),
    (9, 16),
    (10, 16),
    (10, 18),
    (10, 14),
    (12, 16),
    (7, 16),
    (8, 12),
    (6, 18),
    (10, 20),
]
SMALL_GRIDS: list[Grid] = [(4, 16), (5, 13), (6, 11), (8, 8), (6, 14), (8, 10), (7, 10), (5, 14)]
FILM_GRIDS: list[Grid] = [(8, 8), (6, 11), (7, 10), (8, 16), (10, 13), (11, 12), (9, 16), (12, 11)]

Task = Callable[[Studio, Grid], Sample]
ONE_PICTURE: list[tuple[float, Task]] = [
    (0.54, tasks.plain_reading), (0.09, tasks.one_line), (0.15, tasks.shape_box), (0.09, tasks.word_box),
    (0.04, tasks.describe), (0.09, tasks.chinese_reading),
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One batch: the sort of samples, the grid of every slot and how many samples."""

    sort: str  # "one", "two" (turns), "table", "several", "conversation", "video", "talk"
    grids: tuple[Grid, ...]
    size: int


def level_at(progress: float) -> float:
    return max(0.0, min(1.0, (progress - 0.03) / 0.2))


def choose_recipe(rng: random.Random, progress: float, budget: int) -> Recipe:
    """`budget`: vision tokens per batch."""
    sort, grids = _sort_and_grids(rng, progress)
    tokens = sum(rows * columns for rows, columns in grids)
    largest = 512 if progress < 0.15 else 320
    size = max(16, min(largest, budget // max(tokens, 48)) // 8 * 8)
    return Recipe(sort, tuple(grids), 48 if sort == "talk" else size)


def _sort_and_grids(rng: random.Random, progress: float) -> tuple[str, list[Grid]]:
    if progress < 0.04:
        return "one", [rng.choice(WORD_GRIDS)]
    if progress < 0.12:
        return "one", [rng.choice(WORD_GRIDS if rng.random() < 0.25 else LINE_GRIDS)]
    sort = rng.choices(
        ["one", "two", "table", "several", "conversation", "video", "talk"], [0.58, 0.1, 0.13, 0.1, 0.025, 0.055, 0.01]
    )[0]
    if sort == "talk":
        return sort, []
    if sort == "table":
        return sort, [rng.choice(TABLE_GRIDS)]
    if sort == "video":
        return sort, [rng.choice(FILM_GRIDS)] * rng.choice([2, 3, 3, 4, 4, 5])
    if sort in ("several", "conversation"):
        alike = rng.random() < 0.6
        count = rng.choice([2, 2, 3, 3, 4]) if sort == "several" else rng.choice([2, 2, 3])
        return sort, [rng.choice(SMALL_GRIDS)] * count if alike else rng.choices(SMALL_GRIDS, k=count)
    pool = rng.choices([LINE_GRIDS, PAGE_GRIDS, LARGE_GRIDS], [0.12, 0.72, 0.16])[0]
    return sort, [rng.choice(pool)]


def make_sample(studio: Studio, recipe: Recipe, progress: float) -> Sample:
    rng, grids = studio.rng, list(recipe.grids)
    if recipe.sort == "one" and progress < 0.12:
        task = tasks.plain_reading
        sample = task(studio, grids[0])
    elif recipe.sort == "one":
        task = rng.choices([maker for _, maker in ONE_PICTURE], [weight for weight, _ in ONE_PICTURE])[0]
        sample = task(studio, grids[0])
        sample.kind = task.__name__
    elif recipe.sort in ("two", "table"):
        sample = (tasks.follow_up if recipe.sort == "two" else tasks.table)(studio, grids[0])
    else:
        makers = {"several": tasks.several, "conversation": tasks.conversation, "video": tasks.video}
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
        for token in ids:
            self._put(token, (self.next,) * 3)
            self.next += 1

    def _put(self, token: int, position: tuple[int, int, int]) -> None:
        self.out.ids.append(token)
        self.out.positions.append(position)
        self.out.labels.append(-100)
        self.out.refs.append(tasks.NOWHERE)

    def picture(self, picture: Picture) -> None:
        self.tokens([VISION_START])
        rows, columns = self.grids[picture.slots[0]]
        start = self.next
        for step in range(len(picture.slots)):
            for n in range(rows * columns):
                self.out.vision.append(len(self.out.ids))
                place = (start + step, start + n // columns, start + n % columns)
                self._put(VIDEO_PAD if picture.video else IMAGE_PAD, place)
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


def pack_batch(samples: list[Sample], recipe: Recipe, rng: random.Random) -> dict[str, Any]:
    """Everything but pixels. Rows are padded at the right; labels stand where the token is predicted."""
    packed = [write(sample, recipe.grids, recipe.sort == "video" and rng.random() < 0.3) for sample in samples]
    length = -(-max(len(row.ids) for row in packed) // 32) * 32
    count = len(samples)
    ids = np.full((count, length), PAD, np.int16)
    labels = np.full((count, length), -100, np.int16)
    positions = np.zeros((3, count, length), np.int16)
    refs = np.full((count, length), -1, np.int16)
    vision = np.zeros((count, len(packed[0].vision)), np.int16)
    points, offsets = _points(samples, len(recipe.grids))
    for n, row in enumerate(packed):
        end = len(row.ids)
        ids[n, :end], labels[n, :end] = row.ids, row.labels
        positions[:, n, :end] = np.array(row.positions, np.int16).T
        refs[n, :end] = [-1 if slot < 0 else offsets[n][slot] + point for slot, point in row.refs]
        vision[n] = row.vision
    steady = np.array([sample.steady for sample in samples])
    return {
        "recipe": recipe, "ids": ids, "labels": labels, "positions": positions, "refs": refs, "vision": vision,
        "points": points, "steady": steady, "kinds": [sample.kind for sample in samples],
    }  # fmt: skip


def _points(samples: list[Sample], slots: int) -> tuple[np.ndarray, list[list[int]]]:
    """[n, most, 4] rows of (slot, x, y, class), slot -1 where unused; and each slot's first row."""
    rows, offsets = [], []
    for sample in samples:
        row: list[tuple[float, float, float, int]] = []
        starts = []
        for slot in range(slots):
            starts.append(len(row))
            for page in sample.frames[slot]:
                row.extend((slot, x, y, kind) for x, y, kind in page.points)
        rows.append(row)
        offsets.append(starts)
    points = np.full((len(samples), max(1, *(len(row) for row in rows), 1), 4), -1, np.float32)
    for n, row in enumerate(rows):
        if row:
            points[n, : len(row)] = row
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
    samples = [make_sample(studio, recipe, progress) for _ in range(recipe.size)]
    return pack_batch(samples, recipe, rng), samples
