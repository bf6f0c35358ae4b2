"""Every way in which the family writes coordinates, read back; what is broken is told apart from what is not there."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.tasks.boxes import Found, Mark, guess_convention, place, read_marks

REF = "<|object_ref_start|>{}<|object_ref_end|>"
BOX = "<|box_start|>({},{}),({},{})<|box_end|>"


def marks(answer: str) -> list[tuple[str, str, tuple[float, ...]]]:
    reading = read_marks(answer)
    assert reading.unread == ()
    return [(mark.label, mark.shape, mark.numbers) for mark in reading.marks]


@pytest.mark.parametrize(
    "answer",
    [
        REF.format("a dog") + BOX.format(1, 2, 30, 40),
        "Here: " + REF.format("a dog") + BOX.format(1, 2, 30, 40) + " on the left.<|im_end|>",
        "<ref>a dog</ref><box>(1,2),(30,40)</box>",  # Qwen-VL
        "a dog(1,2),(30,40)",  # box tokens taken out by the server
        "- a dog: (1, 2), (30, 40)",
        '```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "a dog"}\n]\n```',
        '{"objects": [{"name": "a dog", "bbox": [1, 2, 30, 40]}]}',
        '[{"object": "a dog", "bboxes": [[1, 2, 30, 40]]}]',
        '{"label": "a dog", "bbox_2d": ["1", "2", 30.0, 40]}',
        "[{'bbox_2d': [1, 2, 30, 40], 'label': 'a dog'},]",
        "```json\n[{bbox_2d: [1, 2, 30, 40], label: “a dog”}] // one\n```",
        '{"name": "a dog", "x1": 1, "y1": 2, "x2": 30, "y2": 40}',
        '{"objects": [{"label": "a dog", "box": {"xmin": 1, "ymin": 2, "xmax": 30, "ymax": 40}}]}',
        "a dog（1，2），（30，40）",
    ],
)
def test_one_box_in_every_way_of_writing(answer: str) -> None:
    assert marks(answer) == [("a dog", "box", (1, 2, 30, 40))]


def test_several_boxes_of_one_label_and_of_several() -> None:
    answer = (
        REF.format("dogs")
        + BOX.format(1, 2, 3, 4)
        + BOX.format(5, 6, 7, 8)
        + REF.format("cat")
        + BOX.format(0, 0, 9, 9)
    )
    assert marks(answer) == [
        ("dogs", "box", (1, 2, 3, 4)),
        ("dogs", "box", (5, 6, 7, 8)),
        ("cat", "box", (0, 0, 9, 9)),
    ]
    assert marks("dogs(1,2),(3,4)(5,6),(7,8)")[1] == ("dogs", "box", (5, 6, 7, 8))
    assert [numbers for _, _, numbers in marks("[[1,2,3,4],[5,6,7,8]]")] == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_quads_and_points() -> None:
    quad = (1, 2, 3, 4, 5, 6, 7, 8)
    assert marks(REF.format("sign") + "<|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|>") == [("sign", "quad", quad)]
    assert marks('{"quad": [[1,2],[3,4],[5,6],[7,8]], "label": "sign"}') == [("sign", "quad", quad)]
    assert marks("<|box_start|>(12,34)<|box_end|>") == [("", "point", (12, 34))]
    assert marks('{"point_2d": [12, 34], "label": "tip"}') == [("tip", "point", (12, 34))]
    assert marks('<points x1="1.5" y1="2" x2="3" y2="4" alt="tips">tips</points>') == [
        ("tips", "point", (1.5, 2)),
        ("tips", "point", (3, 4)),
    ]
    assert marks(" (320, 400).") == [("", "point", (320, 400))]


@pytest.mark.parametrize(
    "answer",
    [
        "There is no dog in the picture.",
        "",
        "[]",
        "```json\n[]\n```",
        '{"bbox_2d": []}',
        '{"bbox_2d": null}',
        "没有狗。",
    ],
)
def test_none_found_is_no_error(answer: str) -> None:
    assert read_marks(answer) == read_marks("")


@pytest.mark.parametrize(
    "answer",
    [
        "<|box_start|>(1,2),(3",
        "<|box_start|>(1,2)",  # cut: the point may be the corner of a box
        "<|box_start|>left of the tree<|box_end|>",
        "<|box_start|>(1,2),(3,4),(5,6)<|box_end|>",
        '{"bbox_2d": [1, 2, 3], "label": "dog"}',
        '{"bbox_2d": [1, 2, 3, "right"], "label": "dog"}',
        '{"bbox_2d": [NaN, 2, 3, 4]}',
        '{"bbox_2d": [1, 2, 3, 4',
        '{"bbox_2d": [1, 2, 3, 1e999]}',
        "<points x1='1'>dogs</points>",
        "the dog is at (1, 2, 3, 4)",
        "x1 = 1, y1 = 2, x2 = 30, y2 = 40",
        '{"x1": 1, "y1": 2, "x2": 30, "y2": "right"}',
        "[" * 5000,
    ],
)
def test_what_cannot_be_read_is_told(answer: str) -> None:
    reading = read_marks(answer)
    assert reading.marks == () and reading.unread != ()


def test_what_stood_before_the_cut_counts() -> None:
    reading = read_marks('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7')
    assert [mark.numbers for mark in reading.marks] == [(1, 2, 3, 4)]
    reading = read_marks(REF.format("a") + BOX.format(1, 2, 3, 4) + "<|box_start|>(5,6),(7")
    assert [mark.numbers for mark in reading.marks] == [(1, 2, 3, 4)] and len(reading.unread) == 1


@pytest.mark.parametrize(
    "name, answer, convention, certain",
    [
        ("Qwen2-VL-7B-Instruct", '{"bbox_2d": [1, 2, 3, 4]}', "relative", True),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", '{"bbox_2d": [1, 2, 3, 4]}', "absolute", True),
        ("qwen2_5_vl", BOX.format(1, 2, 3, 4), "absolute", True),
        ("qwen2.5vl:7b", '{"bbox_2d": [1, 2, 3, 4]}', "absolute", True),
        ("qwen3-vl-plus", '{"bbox_2d": [1, 2, 3, 4]}', "relative", True),
        ("my-model", BOX.format(1, 2, 3, 4), "relative", True),
        ("my-model", '{"bbox_2d": [1, 2, 3, 4]}', "absolute", False),
        ("Qwen2-VL-7B-Instruct", "[0.1, 0.2, 0.35, 1]", "share", True),
        ("Qwen2-VL-7B-Instruct", "(0,0),(1,1)", "relative", True),
    ],
)
def test_the_convention_of_a_model(name: str, answer: str, convention: str, certain: bool) -> None:
    assert guess_convention(name, read_marks(answer)) == (convention, certain)


def test_boxes_land_in_the_original_picture() -> None:
    mark = Mark("dog", "box", (100, 250, 500, 1000))
    assert place(mark, "relative", (2000, 400), (1, 1)) == Found("dog", (200, 100, 1000, 400))
    assert place(mark, "absolute", (2000, 400), (1000, 1000)) == Found("dog", (200, 100, 1000, 400))
    shares = Mark("dog", "box", (0.1, 0.25, 0.5, 1.0))
    assert place(shares, "share", (2000, 400), (1, 1)) == Found("dog", (200, 100, 1000, 400))


def test_corners_are_put_in_order_and_into_the_picture() -> None:
    assert place(Mark("", "box", (900, 800, -50, 200)), "relative", (100, 100), (1, 1)) == Found("", (0, 20, 90, 80))
    assert place(Mark("", "box", (500, 500, 1400, 2000)), "relative", (100, 100), (1, 1)) == Found(
        "", (50, 50, 100, 100)
    )
    assert place(Mark("", "box", (5, 5, 5, 5)), "relative", (100, 100), (1, 1)) == Found("", (0, 0, 1, 1))
    assert place(Mark("", "box", (999, 999, 1000, 1000)), "relative", (10, 10), (1, 1)) == Found("", (9, 9, 10, 10))
    assert place(Mark("", "box", (1200, 0, 1400, 10)), "relative", (100, 100), (1, 1)) is None
    assert place(Mark("", "point", (999, 999)), "relative", (100, 100), (1, 1)) == Found("", None, point=(99, 99))


def test_a_quad_keeps_its_corners_and_gets_a_box() -> None:
    found = place(Mark("s", "quad", (100, 0, 200, 100, 100, 200, 0, 100)), "relative", (1000, 500), (1, 1))
    assert found == Found("s", (0, 0, 200, 100), quad=((100, 0), (200, 50), (100, 100), (0, 50)))
    assert found.as_dict() == {
        "label": "s",
        "box": [0, 0, 200, 100],
        "quad": [[100, 0], [200, 50], [100, 100], [0, 50]],
    }


def as_tokens(label: str, box: tuple[int, ...]) -> str:
    return REF.format(label) + BOX.format(*box)


def as_json(label: str, box: tuple[int, ...]) -> str:
    return f"```json\n{json.dumps([{'bbox_2d': list(box), 'label': label}], ensure_ascii=False)}\n```"


def as_bare(label: str, box: tuple[int, ...]) -> str:
    return "{}({},{}),({},{})".format(label, *box)


WRITERS = {"tokens": as_tokens, "json": as_json, "bare": as_bare}
LABELS = st.sampled_from(["dog", "the red circle", "绿色三角形", "número", "a b c"])


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """A picture's width and height, and a box in it."""
    width, height = draw(st.integers(1, 9000)), draw(st.integers(1, 9000))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@settings(max_examples=100, deadline=None)
@given(boxes(), LABELS, st.sampled_from(sorted(WRITERS)), st.booleans())
def test_thousandths_come_back(
    drawn: tuple[tuple[int, int], tuple[int, int, int, int]], label: str, writer: str, swapped: bool
) -> None:
    size, box = drawn
    told = [round(1000 * value / side) for value, side in zip(box, size * 2, strict=True)]
    told = [told[2], told[3], told[0], told[1]] if swapped else told
    (mark,) = read_marks(WRITERS[writer](label, tuple(told))).marks
    found = place(mark, "relative", size, (28, 28))
    assert found is not None and found.label == label and found.box is not None
    for got, wanted, side in zip(found.box, box, size * 2, strict=True):
        assert abs(got - wanted) <= side / 2000 + 1.5  # rounded twice, and a box has at least a pixel


@settings(max_examples=100, deadline=None)
@given(boxes(), LABELS, st.sampled_from(sorted(WRITERS)), st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_pixels_of_the_resized_picture_come_back(
    drawn: tuple[tuple[int, int], tuple[int, int, int, int]], label: str, writer: str, patches: tuple[int, int]
) -> None:
    size, box = drawn
    seen = (28 * patches[0], 28 * patches[1])
    told = tuple(round(value * s / side) for value, s, side in zip(box, seen * 2, size * 2, strict=True))
    (mark,) = read_marks(WRITERS[writer](label, told)).marks
    found = place(mark, "absolute", size, seen)
    assert found is not None and found.label == label and found.box is not None
    for got, wanted, s, side in zip(found.box, box, seen * 2, size * 2, strict=True):
        assert abs(got - wanted) <= side / s / 2 + 1.5


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='(),[]{}<>|box_startendquadref":-. 0123456789\n', max_size=80))
def test_no_answer_breaks_the_reader(answer: str) -> None:
    for mark in read_marks(answer).marks:
        found = place(mark, "relative", (640, 480), (28, 28))
        if found is not None and found.box is not None:
            left, top, right, bottom = found.box
            assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
