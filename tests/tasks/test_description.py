"""describe: how long and in which language it is asked for; the bundled checkpoint names shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qvl.tasks import describe
from qvl.tasks.description import MAX_TOKENS
from qvl.types import MediaPart
from tests.tasks.scripted import Scripted

if TYPE_CHECKING:
    from qvl import LLM


def test_the_bundled_checkpoint_names_shapes(demo: LLM, samples: Path) -> None:
    for length in ("medium", "short"):
        assert describe(samples / "shapes.png", length=length, model=demo).startswith("A red circle, a g")


@pytest.mark.parametrize(
    "length, lang, prompt",
    [
        ("medium", "en", "Describe this image."),
        ("short", "en", "Describe this image in one sentence."),
        ("long", "French", "Describe this image in detail. Answer in French."),
        ("medium", "zh", "描述这张图片"),
        ("short", "zh-CN", "用一句话描述这张图片"),
    ],
)
def test_what_is_asked(samples: Path, length: str, lang: str, prompt: str) -> None:
    model = Scripted([" A picture.\n"])
    assert describe(samples / "open.png", length=length, lang=lang, model=model) == "A picture."  # type: ignore[arg-type]
    assert model.prompts() == [prompt]
    assert model.asked[0][1].max_tokens == MAX_TOKENS[length]  # type: ignore[index]


def test_a_video(samples: Path) -> None:
    model = Scripted(["x"])
    describe(samples / "words.mp4", model=model)
    part = model.asked[0][0][-1].parts[0]
    assert isinstance(part, MediaPart) and part.kind == "video"
    assert model.prompts() == ["Describe this video."]
