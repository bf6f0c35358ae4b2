"""Tasks: what is drawn, what is asked and what the right answer is.

A Sample is a conversation over pages. Answers are token ids, each with the page point that it reads (or -1), so that
training can show the network where to look. Does not know batches or tensors.
"""

import random
from dataclasses import dataclass

from tools.demo_model import phrases as ask
from tools.demo_model.draw import Box, Line, Page, table_page, text_page
from tools.demo_model.fonts import FontBook
from tools.demo_model.shapes import CHINESE_COLORS, CHINESE_KINDS, Shape, shapes_page
from tools.demo_model.vocab import SPECIAL, TOKEN_OF, encode

TOKEN = 28  # pixels per side that one vision token covers
Grid = tuple[int, int]  # rows, columns of vision tokens
Answer = list[tuple[int, tuple[int, int]]]  # (token id, (slot, point)); slot -1: nothing to point at
NOWHERE = (-1, -1)


@dataclass
class Picture:
    """A picture (one slot) or a video (several slots): slot = one temporal step of the vision tower."""

    slots: list[int]
    video: bool = False


@dataclass
class Turn:
    parts: list[str | Picture]
    answer: Answer


@dataclass
class Sample:
    frames: list[list[Page]]  # per slot: one page, or the two frames of a video step
    turns: list[Turn]
    system: str | None = ask.SYSTEM
    vision_id: bool = False
    steady: bool = False  # the answer depends on exact geometry: do not warp
    kind: str = ""


@dataclass
class Studio:
    """What every task needs: randomness, fonts and how far the curriculum has come (0..1)."""

    rng: random.Random
    book: FontBook
    level: float = 1.0

    @property
    def plain(self) -> bool:
        """Dark on light only: always at the start, ever less later."""
        return self.rng.random() > 0.15 + self.level

    def page(self, grid: Grid, lines: int, script: str = "latin") -> tuple[Page, list[Line]]:
        return text_page(self.rng, self.book, grid[1] * TOKEN, grid[0] * TOKEN, lines, self.plain, script)


def say(text: str) -> Answer:
    return [(token, NOWHERE) for token in encode(text)]


def spell(text: str, ref: int) -> Answer:
    """Text about a shape; every token points at the shape's centre."""
    return [(token, (0, ref)) for token in encode(text)]


def read(line: Line, slot: int = 0) -> Answer:
    """The line's characters; one token each, each pointing at its centre."""
    return [
        (TOKEN_OF[character], (slot, ref) if ref >= 0 else NOWHERE)
        for character, ref in zip(line.text, line.refs, strict=True)
    ]


def read_all(lines: list[Line], slot: int = 0) -> Answer:
    answer: Answer = []
    for n, line in enumerate(lines):
        answer += (say("\n") if n else []) + read(line, slot)
    return answer


def most_lines(grid: Grid) -> int:
    return max(1, min(6, int((grid[0] * TOKEN - 10) / 36)))


def some_lines(studio: Studio, grid: Grid) -> int:
    """Few lines early in the curriculum, evenly many later."""
    most = min(most_lines(grid), 1 + int(studio.level * 12))
    return studio.rng.randint(1, most)


def read_question(rng: random.Random, script: str = "latin") -> str:
    return rng.choice(ask.READ_ZH if rng.random() < (0.5 if script == "chinese" else 0.12) else ask.READ)


def plain_reading(studio: Studio, grid: Grid, script: str = "latin") -> Sample:
    page, lines = studio.page(grid, some_lines(studio, grid), script)
    return Sample([[page]], [Turn([Picture([0]), read_question(studio.rng, script)], read_all(lines))])


def chinese_reading(studio: Studio, grid: Grid) -> Sample:
    return plain_reading(studio, grid, "chinese")


def line_question(rng: random.Random, index: int, total: int, follow: bool) -> str:
    if rng.random() < 0.12 and not follow:
        return rng.choice(ask.LINE_ZH).format(ask.ORDINALS_ZH[index])
    if index == total - 1 and total > 1 and rng.random() < 0.2 and not follow:
        return rng.choice(ask.LAST_LINE)
    return rng.choice(ask.FOLLOW if follow else ask.LINE).format(ask.ORDINALS[index])


def one_line(studio: Studio, grid: Grid) -> Sample:
    rng = studio.rng
    page, lines = studio.page(grid, most_lines(grid) if rng.random() < 0.5 else some_lines(studio, grid))
    if rng.random() < 0.06:
        return Sample([[page]], [Turn([Picture([0]), rng.choice(ask.COUNT_LINES)], say(str(len(lines))))])
    index = rng.randrange(len(lines))
    question = line_question(rng, index, len(lines), False)
    return Sample([[page]], [Turn([Picture([0]), question], read(lines[index]))])


def follow_up(studio: Studio, grid: Grid) -> Sample:
    """A reading, then one or two questions about single lines of the same picture."""
    rng = studio.rng
    page, lines = studio.page(grid, max(2, some_lines(studio, grid)))
    first = rng.randrange(len(lines))
    if rng.random() < 0.5:
        turns = [Turn([Picture([0]), read_question(rng)], read_all(lines))]
    else:
        turns = [Turn([Picture([0]), line_question(rng, first, len(lines), False)], read(lines[first]))]
    for _ in range(rng.choice([1, 1, 2])):
        index = rng.randrange(len(lines))
        turns.append(Turn([line_question(rng, index, len(lines), rng.random() < 0.8)], read(lines[index])))
    return Sample([[page]], turns)


def table(studio: Studio, grid: Grid) -> Sample:
    rng = studio.rng
    rows = rng.randint(2, max(2, min(6, int((grid[0] * TOKEN - 8) / 38))))
    columns = rng.randint(2, max(2, min(4, int(grid[1] * TOKEN / 88))))
    page, cells = table_page(rng, studio.book, grid[1] * TOKEN, grid[0] * TOKEN, rows, columns, studio.plain)
    return Sample([[page]], [Turn([Picture([0]), rng.choice(ask.TABLE)], markdown(cells))])


def markdown(cells: list[list[Line]]) -> Answer:
    answer: Answer = []
    for n, row in enumerate(cells):
        answer += say("\n|" if n else "|")
        for cell in row:
            answer += say(" ") + read(cell) + say(" |")
        if n == 0:
            answer += say("\n|" + " --- |" * len(row))
    return answer


def box_answer(page: Page, name: str, box: Box, slot: int = 0) -> Answer:
    """Qwen2-VL's box format; each number points at the middle of the side that it measures."""
    width, height = page.image.size
    x1, y1, x2, y2 = (
        max(0, min(999, round(1000 * value / size))) for value, size in zip(box, (width, height) * 2, strict=True)
    )
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    sides = [(box[0] + 1, cy), (cx, box[1] + 1), (box[2] - 1, cy), (cx, box[3] - 1)]
    answer = [(SPECIAL["<|object_ref_start|>"], NOWHERE), *say(name), (SPECIAL["<|object_ref_end|>"], NOWHERE)]
    answer.append((SPECIAL["<|box_start|>"], NOWHERE))
    for n, value in enumerate((x1, y1, x2, y2)):
        point = (slot, page.mark(*sides[n]))
        answer += say("(" if n in (0, 2) else ",")
        answer += [(token, point) for token in encode(str(value))]
        answer += say(")," if n == 1 else ")" if n == 3 else "")
    return [*answer, (SPECIAL["<|box_end|>"], NOWHERE)]


def shape_name(rng: random.Random, shape: Shape, shapes: list[Shape]) -> str:
    """The full name, or only the kind when that is unambiguous."""
    alone = sum(other.kind == shape.kind for other in shapes) == 1
    return shape.kind if alone and rng.random() < 0.2 else shape.name


def shape_box(studio: Studio, grid: Grid) -> Sample:
    rng = studio.rng
    page, shapes = shapes_page(rng, grid[1] * TOKEN, grid[0] * TOKEN, rng.randint(1, 5))
    if not shapes:
        return shape_box(studio, grid)
    turns, asked = [], rng.sample(shapes, min(len(shapes), rng.choice([1, 1, 1, 2])))
    for n, shape in enumerate(asked):
        name, question = shape_name(rng, shape, shapes), rng.choice(ask.BOX)
        if shape.color in CHINESE_COLORS and shape.kind in CHINESE_KINDS and rng.random() < 0.1:
            name, question = f"{CHINESE_COLORS[shape.color]}色{CHINESE_KINDS[shape.kind]}", rng.choice(ask.BOX_ZH)
        parts: list[str | Picture] = [question.format(name)]
        turns.append(Turn(parts if n else [Picture([0]), *parts], box_answer(page, name, shape.box)))
    return Sample([[page]], turns, steady=True)


def word_box(studio: Studio, grid: Grid) -> Sample:
    """Separate words on a page, one of them asked for."""
    rng = studio.rng
    page, lines = studio.page(grid, rng.randint(1, most_lines(grid)))
    line = rng.choice(lines)
    sole = [other.text for other in lines].count(line.text) == 1
    if not sole or "\n" in line.text or line.text.count(" ") > 2:
        return word_box(studio, grid)
    question = rng.choice(ask.BOX_WORD).format(line.text)
    return Sample([[page]], [Turn([Picture([0]), question], box_answer(page, line.text, line.box))], steady=True)


def describe(studio: Studio, grid: Grid) -> Sample:
    rng = studio.rng
    page, shapes = shapes_page(rng, grid[1] * TOKEN, grid[0] * TOKEN, rng.randint(1, 6))
    if not shapes:
        return describe(studio, grid)
    kind = rng.random()
    if kind < 0.5:
        return Sample([[page]], [Turn([Picture([0]), rng.choice(ask.DESCRIBE)], list_shapes(shapes))])
    single = [shape for shape in shapes if sum(other.kind == shape.kind for other in shapes) == 1]
    if kind < 0.75 and single:
        shape = rng.choice(single)
        question = rng.choice(ask.COLOR_OF).format(shape.kind)
        answer = [*spell(shape.color.capitalize(), shape.ref), *say(".")]
        return Sample([[page]], [Turn([Picture([0]), question], answer)])
    return Sample([[page]], [Turn([Picture([0]), rng.choice(ask.COUNT)], say(str(len(shapes))))])


def list_shapes(shapes: list[Shape]) -> Answer:
    """From left to right: "A red circle, an orange star and a blue cross."."""
    shapes, answer = sorted(shapes, key=lambda shape: shape.box[0]), []
    for n, shape in enumerate(shapes):
        text = f"{'an' if shape.name[0] in 'aeiou' else 'a'} {shape.name}"
        answer += say("" if n == 0 else " and " if n == len(shapes) - 1 else ", ")
        answer += spell(text if n else text.capitalize(), shape.ref)
    return [*answer, *say(".")]


def several(studio: Studio, grids: list[Grid]) -> Sample:
    """Several pictures in one question: read number N, or find the one that says X."""
    rng = studio.rng
    drawn = [studio.page(grid, rng.choice([1, 1, 2])) for grid in grids]
    texts = ["\n".join(line.text for line in lines) for _, lines in drawn]
    chosen = rng.randrange(len(grids))
    slot_lines = drawn[chosen][1]
    line = rng.choice(slot_lines)
    unique = sum(line.text in text for text in texts) == 1
    if unique and rng.random() < 0.5:
        question = rng.choice(ask.WHICH).format(line.text)
        answer = say("Picture ") + [(token, (chosen, line.refs[0])) for token in encode(str(chosen + 1))] + say(".")
    else:
        by_name = rng.random() < 0.2
        question = rng.choice(ask.READ_NTH if by_name else ask.READ_N)
        question = question.format(ask.ORDINALS[chosen] if by_name else chosen + 1)
        answer = read_all(slot_lines, chosen)
    parts: list[str | Picture] = [Picture([n]) for n in range(len(grids))]
    parts = [question, *parts] if rng.random() < 0.1 else [*parts, question]
    return Sample([[page] for page, _ in drawn], [Turn(parts, answer)], vision_id=rng.random() < 0.25)


def conversation(studio: Studio, grids: list[Grid]) -> Sample:
    """One picture per turn; every answer is about the newest picture."""
    rng, turns, frames = studio.rng, [], []
    if rng.random() < 0.2:
        turns.append(small_talk_turn(rng))
    for slot, grid in enumerate(grids):
        page, lines = studio.page(grid, rng.choice([1, 2, 2, 3]))
        frames.append([page])
        question = rng.choice(ask.ANOTHER) if slot and rng.random() < 0.4 else read_question(rng)
        turns.append(Turn([Picture([slot]), question], read_all(lines, slot)))
        if rng.random() < 0.3:
            index = rng.randrange(len(lines))
            turns.append(Turn([line_question(rng, index, len(lines), True)], read(lines[index], slot)))
    if rng.random() < 0.1:
        turns.append(Turn([rng.choice(ask.TALK[ask.THANKS])], say(ask.THANKS)))
    return Sample(frames, turns)


def small_talk_turn(rng: random.Random) -> Turn:
    answer = rng.choice([key for key in ask.TALK if key != ask.NO_PICTURE])
    return Turn([rng.choice(ask.TALK[answer])], say(answer))


def small_talk(studio: Studio, grids: list[Grid]) -> Sample:
    rng, turns = studio.rng, []
    for _ in range(rng.choice([1, 1, 2, 3])):
        answer = rng.choice(list(ask.TALK))
        turns.append(Turn([rng.choice(ask.TALK[answer])], say(answer)))
    return Sample([], turns)
