"""Asks a checkpoint, through transformers, every question of samples/questions.json: `... qvl/demo`.

Prints each answer; a wrong one makes the exit code 1. Knows the files' format; not who serves the checkpoint.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from tools.demo_model.clips import video_frames
from tools.demo_model.score import Reader, overlap


def opened(path: Path) -> Image.Image | list[Image.Image]:
    return video_frames(path) if path.suffix == ".mp4" else Image.open(path).convert("RGB")


def right(case: dict[str, Any], answer: str, media: list[Any]) -> bool:
    if "box" in case:
        return overlap(answer, tuple(case["box"]), media[0].size) >= 0.8
    return answer == case["answer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("samples"))
    arguments = parser.parse_args()
    reader, wrong = Reader(arguments.checkpoint, "cpu"), 0
    for case in json.loads((arguments.folder / "questions.json").read_text()):
        media = [opened(arguments.folder / name) for name in case["media"]]
        answer = reader.answer([*media, case["ask"]])
        good = right(case, answer, media)
        wrong += not good
        print("right" if good else "WRONG", case["media"], case["ask"], repr(answer))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
