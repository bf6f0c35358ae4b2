"""Scores a checkpoint on held-out pictures: `python -m tools.demo_model.score qvl/demo --count 100`.

Runs transformers' own Qwen2-VL, free-running and greedy, on pictures from held_out.py. Knows how answers are judged.
"""

import argparse
import inspect
import json
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from tools.demo_model import held_out, phrases
from tools.demo_model.checkpoint import MEAN, STD
from tools.demo_model.fonts import FontBook

VIDEO_MIN_PIXELS = 128 * 28 * 28
Score = tuple[float, float]  # right, of


def smart_size(height: int, width: int, low: int, high: int) -> tuple[int, int]:
    """Both sides multiples of 28, the area within bounds; as Qwen2-VL's processor does it."""
    tall, wide = round(height / 28) * 28, round(width / 28) * 28
    if tall * wide > high:
        beta = (height * width / high) ** 0.5
        return int(height / beta / 28) * 28, int(width / beta / 28) * 28
    if tall * wide < low:
        beta = (low / (height * width)) ** 0.5
        return -int(-height * beta // 28) * 28, -int(-width * beta // 28) * 28
    return tall, wide


def patches(frames: list[Image.Image], low: int, high: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Pixel rows and grid of one picture (its frame counts twice) or of one video."""
    tall, wide = smart_size(frames[0].height, frames[0].width, low, high)
    frames = [frame.resize((wide, tall), Image.Resampling.BICUBIC) for frame in frames]
    frames = frames + frames[-1:] if len(frames) % 2 else frames
    x = np.stack([np.asarray(frame, np.float32) / 255 for frame in frames])
    x = ((x - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(0, 3, 1, 2)
    steps, rows, columns = len(frames) // 2, tall // 14, wide // 14
    x = x.reshape(steps, 2, 3, rows // 2, 2, 14, columns // 2, 2, 14).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return torch.from_numpy(np.ascontiguousarray(x.reshape(-1, 1176))), (steps, rows, columns)


class Reader:
    """A checkpoint that answers conversations; each user turn is a list of pictures, videos (lists) and text."""

    def __init__(self, folder: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        config = json.loads((folder / "preprocessor_config.json").read_text())
        self.low, self.high, self.device = config["min_pixels"], config["max_pixels"], device

    def answer(self, *turns: list[Any] | str) -> str:
        """The last answer; odd turns are ours, even ones the model's."""
        images, videos = [], []
        messages = []
        for n, turn in enumerate(turns):
            content = []
            for part in [turn] if isinstance(turn, str) else turn:
                if isinstance(part, Image.Image):
                    images.append(patches([part], self.low, self.high))
                elif isinstance(part, list):
                    videos.append(patches(part, VIDEO_MIN_PIXELS, self.high))
                kind = "text" if isinstance(part, str) else "image" if isinstance(part, Image.Image) else "video"
                content.append({"type": kind, kind: part if kind == "text" else ""})
            messages.append({"role": "assistant" if n % 2 else "user", "content": content})
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._generate(prompt, images, videos)

    def _generate(self, prompt: str, images: list[Any], videos: list[Any]) -> str:
        inputs: dict[str, torch.Tensor] = {}
        for token, media, name, grid in (
            ("<|image_pad|>", images, "pixel_values", "image_grid_thw"),
            ("<|video_pad|>", videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if media:
                inputs[name] = torch.cat([pixels for pixels, _ in media])
                inputs[grid] = torch.tensor([size for _, size in media])
                counts = iter([t * h * w // 4 for _, (t, h, w) in media])
                pieces = prompt.split(token)
                prompt = pieces[0] + "".join(token * next(counts) + piece for piece in pieces[1:])
        inputs |= self.tokenizer(prompt, return_tensors="pt")
        if (images or videos) and "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            # transformers from 5.x on asks what stands where instead of looking for pads.
            image, video = (
                inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
                for kind in ("image", "video")
            )
            inputs["mm_token_type_ids"] = image.int() + 2 * video.int()
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=300, do_sample=False)
        text = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
        return text.replace("<|im_end|>", "").replace("<|endoftext|>", "")


def distance(a: str, b: str) -> int:
    """Edit distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, old = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(old[j] + 1, row[-1] + 1, old[j - 1] + (x != y)))
    return row[-1]


def characters(found: str, wanted: str) -> Score:
    return max(0, len(wanted) - distance(found, wanted)), len(wanted)


def overlap(text: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> float:
    """Intersection over union of an answer in Qwen2-VL's box format and a box in pixels."""
    found = re.search(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>", text)
    if not found:
        return 0.0
    x1, y1, x2, y2 = (int(value) * side / 1000 for value, side in zip(found.groups(), size * 2, strict=True))
    inner = max(0.0, min(x2, box[2]) - max(x1, box[0])) * max(0.0, min(y2, box[3]) - max(y1, box[1]))
    return inner / ((x2 - x1) * (y2 - y1) + (box[2] - box[0]) * (box[3] - box[1]) - inner)


def score_text(reader: Reader, rng: random.Random, book: FontBook, script: str = "latin") -> Score:
    card = held_out.text_card(rng, book, rng.randint(1, 6 if script == "latin" else 4), script)
    image = held_out.wear(rng, card.image)
    return characters(reader.answer([image, rng.choice(phrases.READ)]), "\n".join(card.lines))


def score_chinese(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    return score_text(reader, rng, book, "chinese")


def score_table(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    image, cells = held_out.table_card(rng, book, rng.randint(2, 5), rng.randint(2, 4))
    answer = reader.answer([held_out.wear(rng, image, turn=False), rng.choice(phrases.TABLE)])
    rows = [[cell.strip() for cell in row.strip().strip("|").split(" |")] for row in answer.split("\n")]
    rows = rows[:1] + rows[2:]
    right = sum(
        row < len(rows) and column < len(rows[row]) and rows[row][column] == cell
        for row, line in enumerate(cells) for column, cell in enumerate(line)
    )  # fmt: skip
    return right, sum(len(line) for line in cells)


def score_several(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    cards = [held_out.text_card(rng, book, rng.choice([1, 2]), limit=12) for _ in range(rng.randint(2, 4))]
    images = [held_out.wear(rng, card.image) for card in cards]
    chosen = rng.randrange(len(cards))
    line = rng.choice(cards[chosen].lines)
    if rng.random() < 0.5 and sum(line in "\n".join(card.lines) for card in cards) == 1:
        return reader.answer([*images, rng.choice(phrases.WHICH).format(line)]) == f"Picture {chosen + 1}.", 1
    answer = reader.answer([*images, rng.choice(phrases.READ_N).format(chosen + 1)])
    return answer == "\n".join(cards[chosen].lines), 1


def score_shape(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    card = held_out.shapes_card(rng)
    shape = rng.choice(card.shapes)
    answer = reader.answer([held_out.wear(rng, card.image, turn=False), rng.choice(phrases.BOX).format(shape.name)])
    return overlap(answer, shape.box, card.image.size), 1


def score_colour(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    while True:
        shapes = (card := held_out.shapes_card(rng)).shapes
        single = [shape for shape in shapes if sum(other.kind == shape.kind for other in shapes) == 1]
        if single:
            break
    shape = rng.choice(single)
    question = rng.choice(phrases.COLOR_OF).format(shape.kind)
    answer = reader.answer([held_out.wear(rng, card.image, turn=False), question])
    return answer == shape.color.capitalize() + ".", 1


def score_describe(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    """Shapes named, in whatever order."""
    card = held_out.shapes_card(rng)
    answer = reader.answer([held_out.wear(rng, card.image, turn=False), rng.choice(phrases.DESCRIBE)])
    found = [name.lower() for name in re.findall(r"\b[Aa]n? (\w+ \w+)", answer)]
    wanted = [shape.name for shape in card.shapes]
    return sum(name in found for name in wanted), max(len(wanted), len(found))


def score_count(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    card = held_out.shapes_card(rng)
    answer = reader.answer([held_out.wear(rng, card.image, turn=False), rng.choice(phrases.COUNT)])
    return answer == str(len(card.shapes)), 1


def score_word(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    card = held_out.text_card(rng, book, rng.randint(2, 5), limit=9)
    index = rng.randrange(len(card.lines))
    if card.lines.count(card.lines[index]) > 1:
        return score_word(reader, rng, book)
    question = rng.choice(phrases.BOX_WORD).format(card.lines[index])
    answer = reader.answer([held_out.wear(rng, card.image, turn=False), question])
    return overlap(answer, card.boxes[index], card.image.size), 1


def score_box(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    return (score_shape if rng.random() < 0.5 else score_word)(reader, rng, book)


def score_video(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    return _words_in_place(reader, rng, *held_out.film(rng, book))


def score_clip(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    from tools.demo_model import clips  # needs PyAV, which the other sets do without

    return _words_in_place(reader, rng, *clips.word_clip(rng, book))


def _words_in_place(reader: Reader, rng: random.Random, frames: list[Image.Image], shown: list[str]) -> Score:
    found = reader.answer([frames, rng.choice(phrases.VIDEO)]).split(" ")
    return sum(a == b for a, b in zip(found, shown, strict=False)), len(shown)


def score_follow(reader: Reader, rng: random.Random, book: FontBook) -> Score:
    card = held_out.text_card(rng, book, rng.randint(2, 5))
    image, index = held_out.wear(rng, card.image), rng.randrange(len(card.lines))
    first = [image, rng.choice(phrases.READ)]
    follow = rng.choice(phrases.FOLLOW).format(phrases.ORDINALS[index])
    return reader.answer(first, reader.answer(first), follow) == card.lines[index], 1


SETS: dict[str, tuple[Callable[..., Score], str, float]] = {
    "text": (score_text, "characters read, 1-6 lines", 98.0),
    "table": (score_table, "cells of tables up to 5x4", 92.0),
    "several": (score_several, "right picture, or read it, of 2-4", 97.0),
    "box": (score_box, "median IoU, shape or words", 80.0),
    "shape": (score_shape, "median IoU, coloured shape", 80.0),
    "word": (score_word, "median IoU, printed words", 80.0),
    "video": (score_video, "words of a video in order", 95.0),
    "clip": (score_clip, "words of an H.264 file in order", 0.0),
    "colour": (score_colour, "colour of a shape", 0.0),
    "describe": (score_describe, "shapes named with their colours", 0.0),
    "count": (score_count, "number of shapes", 0.0),
    "follow": (score_follow, "line asked for in a second turn", 95.0),
    "chinese": (score_chinese, "Chinese characters read (stretch)", 0.0),
}


def run(reader: Reader, name: str, count: int, book: FontBook, seed: int) -> float:
    """Percent right, or 100 x the median overlap."""
    judge, rng = SETS[name][0], random.Random(f"{seed}/{name}")
    scores = [judge(reader, rng, book) for _ in range(count)]
    if name in ("box", "shape", "word"):
        return 100 * statistics.median(value for value, _ in scores)
    return 100 * sum(right for right, _ in scores) / sum(total for _, total in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--fonts", type=Path, default=Path(".fonts"))
    parser.add_argument("--count", type=int, default=100, help="pictures or conversations per set")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    reader, book = Reader(arguments.checkpoint, arguments.device), FontBook(arguments.fonts, "held_out")
    results = {}
    for name in arguments.sets:
        start = time.time()
        results[name] = round(run(reader, name, arguments.count, book, arguments.seed), 2)
        _, meaning, wanted = SETS[name]
        spent = time.time() - start
        print(f"{name:8} {results[name]:6.2f}  (goal {wanted:.0f})  {meaning}  [{spent:.0f} s]", flush=True)
    print(json.dumps({"count": arguments.count, "seed": arguments.seed, **results}))


if __name__ == "__main__":
    main()
