"""`qvl ground`: boxes on standard output, pictures where they were asked for, nothing of the person's own touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qvl.cli.app import run
from tests.tasks.scripted import Answer, Scripted

BOX = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """What the model says, in order."""
    told: list[Answer] = [BOX]
    monkeypatch.setattr("qvl.cli.tasks.perform.find_model", lambda who, quiet: Scripted(told))
    return told


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (1000, 500), "white").save(path)
    return path


def test_boxes_are_printed_as_json(answers: list[Answer], photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ground", "the dog", str(photo)]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ([{"label": "dog", "box": [100, 100, 500, 300]}], "")


def test_none_found_is_an_empty_list_and_no_failure(
    answers: list[Answer], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers[:] = ["There is no cat."]
    assert run(["ground", "the cat", str(photo)]) == 0
    out, err = capsys.readouterr()
    assert out == "[]\n" and "none found; the model says: There is no cat." in err
    assert run(["ground", "the cat", str(photo), "-q"]) == 0
    assert capsys.readouterr() == ("[]\n", "")


def test_an_answer_that_cannot_be_read_is_exit_code_1(
    answers: list[Answer], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers[:] = ["<|box_start|>(1,2),(3"]
    assert run(["ground", "the cat", str(photo)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "<|box_start|>(1,2),(3" in err


def test_the_picture_is_drawn_beside_and_stays_as_it_was(answers: list[Answer], photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    assert run(["ground", "the dog", str(photo), "--draw", str(tmp_path / "out.png"), "-q"]) == 0
    drawn = Image.open(tmp_path / "out.png").convert("RGB")
    assert drawn.size == (1000, 500) and drawn.getpixel((300, 100)) != (255, 255, 255)
    assert photo.read_bytes() == before


def test_several_pictures_are_drawn_into_a_folder(
    answers: list[Answer], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo.parent / "more").mkdir()
    Image.new("RGB", (50, 50)).save(photo.parent / "more" / "photo.jpg")
    drawn = tmp_path / "drawn"
    inputs = [str(photo), str(photo.parent / "more"), str(tmp_path / "missing.png")]
    assert run(["ground", "the dog", *inputs, "--draw", f"{drawn}/"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["result"] is None for line in lines] == [False, False, True]
    assert sorted(path.name for path in drawn.iterdir()) == ["photo.jpg.png", "photo.png"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["", "{photo}"], "say what to look for"),
        (["dog", "{photo}", "--draw", "{photo}"], "is an input"),
        (["dog", "{photo}", "--draw", "out.pdf"], "a picture is written as"),
        (["dog", "{photo}", "{photo}", "--draw", "out.png"], "2 pictures need a folder"),
        (["dog", "{photo}", "--prompt", "Find it"], "the place of the object"),
        (["dog", "{photo}", "--coordinates", "inches"], "'relative'"),
        (["dog", "missing.png"], "no such file"),
        (["dog", "{photo}", "--draw", "/nowhere/out.png"], "cannot write"),
    ],
)
def test_what_cannot_be_is_exit_code_2(
    answers: list[Answer], photo: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ground", *(word.format(photo=photo) for word in arguments)]) == 2
    assert says in capsys.readouterr().err


def test_chinese_labels_without_a_font_are_told(
    answers: list[Answer],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from qvl.tasks import marks

    own = marks.font_for
    monkeypatch.setattr(marks, "font_for", lambda texts, size: None if "狗" in "".join(texts) else own(texts, size))
    answers[:] = [BOX.replace("dog", "狗")]
    assert run(["ground", "狗", str(photo), "--draw", str(tmp_path / "out.png")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["label"] == "狗" and "in the picture they are numbers" in err
