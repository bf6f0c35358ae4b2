"""`qvl compare`: two pictures, one result, and a model only where something is to be asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from qvl.cli.app import run
from qvl.types import Delta, SamplingParams, Usage
from tests.cli.tasks.terminal import Terminal
from tests.tasks.scripted import Messages, Scripted

LISTED = json.dumps({"differences": [{"what": "square", "where": "left", "first": "none", "second": "red"}]})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    picture = Image.new("RGB", (300, 200), "white")
    picture.save(tmp_path / "a.png")
    picture.paste((255, 0, 0), (20, 30, 60, 70))
    picture.save(tmp_path / "b.png")
    return str(tmp_path / "a.png"), str(tmp_path / "b.png")


def says(answer: str, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    model = Scripted([answer])
    monkeypatch.setattr("qvl.cli.tasks.pairs.find_model", lambda who, quiet: model)
    return model


def test_in_words(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    says("A red square.", monkeypatch)
    assert run(["compare", *pair]) == 0
    out, err = capsys.readouterr()
    assert out == "A red square.\n" and "of the pixels differ, in 1 place" in err
    assert run(["compare", *pair, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_words_as_they_come(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    seen: list[str] = []

    class Watching:
        def stream(self, messages: Messages, sampling: SamplingParams, /) -> Iterator[Delta]:
            for piece in ("A red", " square."):
                seen.append(terminal.getvalue())
                yield Delta(0, piece)
            yield Delta(0, "", (), None, "stop", None, Usage())

    monkeypatch.setattr("qvl.cli.tasks.pairs.find_model", lambda who, quiet: Watching())
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(["compare", *pair, "-q"]) == 0
    assert (seen, terminal.getvalue()) == (["", "A red"], "A red square.\n")


def test_as_a_list(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    says(LISTED, monkeypatch)
    assert run(["compare", *pair, "--list"]) == 0
    assert capsys.readouterr().out == "- square (left): none -> red\n"
    assert run(["compare", *pair, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["result"]
    assert (told["first"], told["second"]) == pair and told["differences"][0]["what"] == "square"
    ((left, top, right, bottom),) = told["regions"]
    assert abs(left - 20) + abs(top - 30) + abs(right - 60) + abs(bottom - 70) <= 4


def test_the_same_pictures_need_no_model(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(who: object, quiet: bool) -> Scripted:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr("qvl.cli.tasks.pairs.find_model", nobody)
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(pair[0]).read_bytes())
    assert run(["compare", pair[0], str(copy)]) == 0
    assert capsys.readouterr() == ("the pictures are the same, pixel for pixel\n", "")


def test_the_drawing(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says("A red square.", monkeypatch)
    before = [Path(name).read_bytes() for name in pair]
    assert run(["compare", *pair, "--draw", str(tmp_path / "out.png"), "-o", str(tmp_path / "out.txt"), "-q"]) == 0
    assert (tmp_path / "out.txt").read_text() == "A red square.\n"
    drawn = Image.open(tmp_path / "out.png")
    scale = drawn.width // 300
    assert drawn.getpixel((40 * scale, 50 * scale)) == (220, 0, 30)
    assert [Path(name).read_bytes() for name in pair] == before


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["{a}"], "Missing argument"),
        (["-", "-"], "standard input is one picture"),
        (["{a}", "missing.png"], "qvl: no such file: missing.png"),
        (["{a}", "{folder}"], "holds 2 pictures"),
        (["{a}", "{b}", "--draw", "{b}"], "is an input"),
        (["{a}", "{b}", "-o", "{b}"], "is an input"),
        (["{a}", "{b}", "--draw", "out.txt"], "a picture is written as"),
    ],
)
def test_what_cannot_be_is_exit_code_2(
    pair: tuple[str, str],
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says("never", monkeypatch)
    words = [word.format(a=pair[0], b=pair[1], folder=tmp_path) for word in arguments]
    assert run(["compare", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, first, second",
    [
        ("bad.pdf", b"%PDF-1.7 and no more", "{bad}: the PDF is broken", "{bad}: the PDF is broken"),
        ("bad.png", b"no picture", "the first picture: not a picture", "the second picture: not a picture"),
    ],
)
def test_which_of_the_two_cannot_be_read_is_told(
    pair: tuple[str, str],
    tmp_path: Path,
    name: str,
    content: bytes,
    first: str,
    second: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / name
    bad.write_bytes(content)
    for arguments, told in (([str(bad), pair[0]], first), ([pair[0], str(bad)], second)):
        assert run(["compare", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"qvl: {told.format(bad=bad)}")
