"""The video task: words on screen one after another. Knows frames and shots; not batches."""

import random

from tools.demo_model import phrases as ask
from tools.demo_model import words
from tools.demo_model.draw import Line, Page, blank, font_of_height, length, odd_height
from tools.demo_model.tasks import NOWHERE, TOKEN, Answer, Grid, Picture, Sample, Studio, Turn, read, say


def video(studio: Studio, grids: list[Grid]) -> Sample:
    """Words one after another, each on screen for two frames or more; two frames make a slot."""
    rng, grid = studio.rng, grids[0]
    total = 2 * len(grids)
    lengths: list[int] = []
    longest = rng.choice([3, 4, 6, 10])
    while sum(lengths) < total and len(lengths) < 6:
        lengths.append(rng.randint(2, longest))
    texts = _distinct_words(rng, len(lengths))
    path_studio = _WordFilm(studio, grid)
    shots = [path_studio.shot(text) for text in texts]
    order = [n for n, length in enumerate(lengths) for _ in range(length)][:total]
    order += [len(lengths) - 1] * (total - len(order))
    frames = [
        [shots[a][0]] if a == b else [shots[a][0], shots[b][0]] for a, b in zip(order[::2], order[1::2], strict=True)
    ]
    shown = sorted(set(order))
    answer: Answer = []
    for n in shown:
        steps = [step for step in range(len(grids)) if order[2 * step] == n == order[2 * step + 1]]
        slot = steps[0] if steps else -1
        ids = read(shots[n][1], slot)
        answer += (say(" ") if n != shown[0] else []) + (ids if steps else [(token, NOWHERE) for token, _ in ids])
    question = rng.choice(ask.VIDEO)
    return Sample(frames, [Turn([Picture(list(range(len(grids))), True), question], answer)], kind="video")


def _distinct_words(rng: random.Random, count: int) -> list[str]:
    texts: list[str] = []
    while len(texts) < count:
        text = words.short(rng, 9) if rng.random() < 0.6 else words.word(rng)[:9]
        if texts and rng.random() < 0.2:
            text = words.similar(rng, texts[-1])
        if not texts or text != texts[-1]:
            texts.append(text)
    return texts


class _WordFilm:
    """Pages of one film: same paper, ink and font; one word each."""

    def __init__(self, studio: Studio, grid: Grid) -> None:
        self.seed, self.studio, self.grid = studio.rng.getrandbits(32), studio, grid
        self.plain, self.still = studio.plain, studio.rng.random() < 0.5

    def shot(self, text: str) -> tuple[Page, Line]:
        look = random.Random(self.seed)
        width, height = self.grid[1] * TOKEN, self.grid[0] * TOKEN
        page = blank(look, width, height, self.plain)
        path = self.studio.book.pick(look)
        cap = odd_height(look, 22, min(70, height * 0.3))
        font = font_of_height(path, cap)
        while length(font, text) > width - 16 and cap > 18:
            cap -= 2
            font = font_of_height(path, cap)
        spot = look if self.still else self.studio.rng
        x = 8 + max(0.0, width - 16 - length(font, text)) * (0.5 if self.still else spot.random())
        y = cap + 8 + (height - 2 * cap - 16) * (spot.uniform(0.3, 0.7) if self.still else spot.random())
        return page, page.text(x, y, text, font)
