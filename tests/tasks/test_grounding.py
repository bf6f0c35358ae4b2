"""Boxes in the pixels of the picture that was given, whatever size and numbers the model sees and says."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvl.client.calls import body_of
from qvl.errors import BadAnswer, InvalidRequest
from qvl.tasks.boxes import Found
from qvl.tasks.grounding import Ground, ground
from qvl.tasks.pictures import size_seen
from qvl.tasks.run import asking
from qvl.types import ChatRequest, MediaPart, PictureRule
from tests.tasks.scripted import Scripted

TOKENS = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,500),(300,1000)<|box_end|>"
JSON = '```json\n[{"bbox_2d": [100, 100, 200, 300], "label": "dog"}]\n```'


@dataclass
class Sighted(Scripted):
    """A scripted model that tells its name and how it sees pictures."""

    model: str = "my-model"
    rule: PictureRule | None = None

    def picture_rule(self) -> PictureRule | None:
        return self.rule

    def context(self) -> int | None:
        return None


def white(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def test_thousandths_become_pixels_of_the_picture() -> None:
    model = Scripted([TOKENS])
    assert ground("the dog", white(2000, 1000), model=model) == (Found("dog", (200, 500, 600, 1000)),)
    assert model.prompts() == ["Detect the dog."]


def test_box_tokens_are_asked_for_and_travel() -> None:
    model = Scripted([TOKENS])
    ground("the dog", white(280, 280), model=model)
    messages, sampling = model.asked[0]
    assert sampling.temperature == 0 and not sampling.skip_special_tokens
    assert body_of(ChatRequest(messages, sampling), "m")["skip_special_tokens"] is False


def test_a_server_that_knows_no_such_wish_is_asked_without_it() -> None:
    refusal = InvalidRequest("Unrecognized request argument supplied: skip_special_tokens")
    model = Scripted([refusal, "dog(100,500),(300,1000)"])
    assert ground("the dog", white(1000, 1000), model=model)[0].box == (100, 500, 300, 1000)
    assert model.asked[1][1].skip_special_tokens
    with pytest.raises(InvalidRequest, match="other"):
        ground("the dog", white(1000, 1000), model=Scripted([InvalidRequest("some other thing"), TOKENS]))


def test_pixels_of_the_picture_as_the_model_sees_it() -> None:
    """Qwen2.5-VL: the server says how it resizes, so its pixels are known."""
    rule = PictureRule(28, 3136, 401408)
    model = Sighted([JSON], model="Qwen2.5-VL-7B-Instruct", rule=rule)
    found = ground("the dog", white(2000, 1000), model=model)
    width, height = size_seen(np.zeros((1000, 2000, 3), np.uint8), rule)
    assert (width, height) != (2000, 1000)
    scaled = [round(v * s) for v, s in zip((100, 100, 200, 300), (2000 / width, 1000 / height) * 2, strict=True)]
    assert [item.box for item in found] == [tuple(scaled)]
    assert "bbox_2d" in model.prompts()[0]


def test_a_server_that_does_not_say_gets_a_picture_that_it_will_not_resize() -> None:
    model = Sighted([JSON], model="Qwen2.5-VL-7B-Instruct")
    found = ground("the dog", white(3000, 1500), model=model)
    (sent,) = model.media()
    assert isinstance(sent, np.ndarray)
    height, width = sent.shape[:2]
    assert height % 28 == width % 28 == 0 and height * width <= 1280 * 28 * 28
    assert found[0].box == (
        round(300000 / width),
        round(150000 / height),
        round(600000 / width),
        round(450000 / height),
    )


def test_a_guess_is_told_and_can_be_overruled() -> None:
    with pytest.warns(UserWarning, match="--coordinates relative"):
        ground("the dog", white(560, 560), model=Sighted([JSON]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ground("the dog", white(2000, 2000), model=Sighted([JSON]), coordinates="relative")
    assert found[0].box == (200, 200, 400, 600)


def test_the_picture_is_measured_upright() -> None:
    """A phone's photo lies on its side in the file: boxes are for what a person sees."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    white(1000, 500).save(buffer, "JPEG", exif=exif)
    assert ground("the dog", buffer.getvalue(), model=Scripted([TOKENS]))[0].box == (50, 500, 150, 1000)


def test_nothing_found_is_an_empty_list_with_a_remark() -> None:
    task = Ground(what="the dog")
    part = MediaPart("image", white(100, 100))
    result = task.answer(asking(Scripted(["There is no dog here."])), (part,))
    assert (result.value, result.text, result.data) == ((), "[]", [])
    assert result.notes == ("the dog: none found; the model says: There is no dog here.",)


@pytest.mark.parametrize(
    "answer", ["<|box_start|>(1,2),(3<|box_end|>", '{"bbox_2d": [1, 2]}', "at (12, 13), more or less"]
)
def test_an_answer_that_cannot_be_read_is_shown(answer: str) -> None:
    with pytest.raises(BadAnswer) as caught:
        ground("the dog", white(100, 100), model=Scripted([answer]))
    assert answer in caught.value.message


def test_several_things_are_asked_for_one_by_one() -> None:
    unnamed = "<|box_start|>(0,0),(500,500)<|box_end|>"
    model = Scripted([TOKENS, unnamed, "no cat"])
    with pytest.warns(UserWarning, match="a cat: none found"):
        found = ground("the dog", white(1000, 1000), "two balls", "a cat", model=model)
    assert [item.label for item in found] == ["dog", "two balls"]
    assert model.prompts() == ["Detect the dog.", "Detect the two balls.", "Detect a cat."]


def test_what_lies_outside_is_left_out_and_told() -> None:
    answer = TOKENS + "<|box_start|>(1500,0),(1900,10)<|box_end|><|box_start|>(1,2),(3<|box_end|>"
    part = MediaPart("image", white(1000, 1000))
    result = Ground(what="the dog").answer(asking(Scripted([answer])), (part,))
    assert len(result.value) == 1
    assert [("outside" in note, "not understood" in note) for note in result.notes] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    "what, question",
    [
        ("dog", "Detect the dog."),
        ("a dog.", "Detect a dog."),
        ("all dogs", "Detect all dogs."),
        ('the word "OPEN"', 'Detect the word "OPEN".'),
        ("红色的车", "请检测图中的红色的车"),
    ],
)
def test_questions(what: str, question: str) -> None:
    assert Ground(what=what).prompt == question


def test_a_question_of_ones_own() -> None:
    assert Ground(what="dog", template="Find every {what}!").prompt == "Find every dog!"
    with pytest.raises(InvalidRequest, match="place of the object"):
        Ground(what="dog", template="Find it")
    with pytest.raises(InvalidRequest, match="what to look for"):
        Ground(what="  ")


def overlap(one: tuple[int, int, int, int], other: tuple[int, ...]) -> float:
    """Intersection over union."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0, wide) * max(0, high)
    return both / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both)


@pytest.mark.parametrize(
    "what, box",
    [
        ("the red circle", (60, 60, 200, 200)),
        ("blue rectangle", (320, 90, 500, 210)),
        ("绿色三角形", (160, 250, 340, 380)),
    ],
)
def test_the_bundled_checkpoint_finds_shapes(demo: Any, samples: Path, what: str, box: tuple[int, ...]) -> None:
    (found,) = ground(what, samples / "shapes.png", model=demo)
    assert found.box is not None and overlap(found.box, box) > 0.75


def test_the_bundled_checkpoint_finds_words(demo: Any, samples: Path) -> None:
    (found,) = ground('the word "OPEN"', samples / "open.png", model=demo)
    pixels = np.asarray(Image.open(samples / "open.png").convert("L"))
    rows, columns = np.nonzero(pixels[: pixels.shape[0] // 2] < 128)  # the upper line's ink
    assert found.box is not None
    assert overlap(found.box, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)) > 0.5
