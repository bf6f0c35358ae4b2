"""`qvl watch`: which words are files and which are the question, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.cli.app import run
from qvl.cli.tasks.watch import split
from tests.media.clips import clip
from tests.tasks.scripted import Scripted


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted(["A square."])
    monkeypatch.setattr("qvl.cli.tasks.perform.find_model", lambda who, quiet: scripted)
    return scripted


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(30))
    return path


def test_a_question_about_a_file(model: Scripted, film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["watch", str(film), "What happens?"]) == 0
    assert capsys.readouterr() == ("A square.\n", "") and model.prompts() == ["What happens?"]
    assert run(["watch", str(film), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["result"] == {"answer": "A square.", "parts": [{"from": 0.0, "to": 3.0, "answer": "A square."}]}
    assert model.prompts()[-1] == "Describe the video."


def test_only_a_piece_of_it(model: Scripted, film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["watch", str(film), "--from", "0:01", "--to", "2.5", "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["result"]["parts"]
    assert (part["from"], part["to"]) == (1.0, 2.5)


@pytest.mark.parametrize(
    "words, files, question",
    [
        ([], 0, None),
        (["a.mp4"], 1, None),
        (["a.mp4", "b.webm"], 2, None),
        (["a.mp4", "What?"], 1, "What?"),
        (["a.mp4", "https://example.com/b"], 2, None),
        (["-", "What?"], 1, "What?"),
        (["-"], 1, None),
        (["What?"], 0, "What?"),
        (["a.mp4", ""], 1, ""),
        (["a.mp4", "x" * 5000], 1, "x" * 5000),
    ],
)
def test_the_last_word_is_the_question_unless_it_is_a_file(words: list[str], files: int, question: str | None) -> None:
    assert split(words) == (words[:files], question)


def test_a_folder_is_no_question(tmp_path: Path) -> None:
    assert split([str(tmp_path)]) == ([str(tmp_path)], None)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["{film}", "--from", "soon"], "is no time"),
        (["{film}", "--from", "9"], "lasts 0:03"),
        (["{film}", "--to", "0"], "behind the beginning"),
        (["{film}", "--fps", "0"], "fps"),
        (["{film}", ""], "the question is empty"),
        (["missing.mp4", "What?"], "no such file"),
    ],
)
def test_what_cannot_be_is_exit_code_2(
    model: Scripted, film: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["watch", *(word.format(film=film) for word in arguments)]) == 2
    assert says in capsys.readouterr().err
