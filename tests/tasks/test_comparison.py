"""What differs between two pictures, as a model tells it; what the pixels say stands beside it."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from qvl.errors import BadAnswer, RequestFailed
from qvl.tasks.comparison import PROMPTS, SCHEMA, Compare, compare
from qvl.tasks.run import asking
from qvl.types import MediaPart
from tests.tasks.scripted import Scripted

WHITE = Image.new("RGB", (200, 100), "white")
MARKED = WHITE.copy()
MARKED.paste((255, 0, 0), (20, 30, 60, 70))
ITEM = {"what": "square", "where": "left", "first": "none", "second": "red"}


def test_the_model_sees_both_in_order_and_is_asked_once() -> None:
    model = Scripted(["A red square."])
    told = compare(WHITE, MARKED, model=model)
    assert told.text == "A red square." and model.media() == [WHITE, MARKED] and model.prompts() == [PROMPTS["en"]]
    assert len(told.pixels.regions) == 1 and told.differences == ()


def test_a_list_keeps_to_its_schema() -> None:
    model = Scripted([json.dumps({"differences": [ITEM]})])
    told = compare(WHITE, MARKED, listed=True, model=model)
    assert told.differences == (ITEM,)
    constraint = model.asked[0][1].constraint
    assert constraint is not None and json.loads(constraint.text) == SCHEMA.schema


def test_a_list_that_does_not_keep_to_it_is_asked_for_again_and_then_an_error() -> None:
    model = Scripted(['{"differences": "many"}', json.dumps({"differences": []})])
    assert compare(WHITE, MARKED, listed=True, model=model).differences == () and len(model.asked) == 2
    with pytest.raises(BadAnswer):
        compare(WHITE, MARKED, listed=True, model=Scripted(["none"]))


def test_pictures_that_are_the_same_need_no_model() -> None:
    model = Scripted([RequestFailed("nobody should ask")])
    told = compare(WHITE, WHITE.copy(), model=model)
    assert told.text == "the pictures are the same, pixel for pixel" and told.pixels.identical and model.asked == []


def test_how_it_is_printed() -> None:
    parts = (MediaPart("image", WHITE), MediaPart("image", MARKED))
    result = Compare().answer(asking(Scripted(["A red square.\n"])), parts)
    assert result.text == "A red square." and result.data["answer"] == "A red square."
    assert result.data["regions"] == [list(box) for box in result.value.pixels.regions]
    assert len(result.notes) == 1 and result.notes[0].endswith(" of the pixels differ, in 1 place")
    listed = Compare(listed=True).answer(asking(Scripted([json.dumps({"differences": [ITEM]})])), parts)
    assert listed.text == "- square (left): none -> red" and listed.data["differences"] == [ITEM]
    with pytest.raises(BadAnswer, match="empty"):
        Compare().answer(asking(Scripted([" "])), parts)
