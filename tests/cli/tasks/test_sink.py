"""Names of the files in a folder, and outcomes as JSON."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from PIL import Image

from qvl.cli.tasks.pictures import save
from qvl.cli.tasks.sink import as_dict, open_sink
from qvl.errors import BadAnswer, InvalidRequest
from qvl.tasks import Ocr, Outcome, ReadTable, Result
from qvl.tasks.inputs import Item
from qvl.types import TextPart

FILES = ('"a.png", "page": null', '"b.pdf", "page": 2')


def item(file: str, page: int | None = None, name: str | None = None) -> Item:
    return Item(file, lambda: TextPart(""), page, name or file)


def result(text: str) -> Result[str]:
    return Result(text, text, text)


def test_no_file_of_a_folder_is_written_twice(tmp_path: Path) -> None:
    found = [
        item("a.png"),
        item("b/a.jpg", name="a.jpg"),
        item("c/a.png", name="a.png"),
        item("one.pdf", 4),
        item("deep/x"),
    ]
    found += [item("two.pdf", 1), item("two.pdf", 12)]
    with open_sink(str(tmp_path), found, Ocr(), as_json=False) as sink:
        for number, one in enumerate(found):
            sink.put(Outcome(one, result(str(number))))
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.txt")}
    assert written == {
        "a.txt": "0\n",
        "a.jpg.txt": "1\n",
        "a.png.txt": "2\n",
        "one.txt": "3\n",
        "deep/x.txt": "4\n",
        "two-001.txt": "5\n",
        "two-012.txt": "6\n",
    }


def test_a_failed_one_has_no_file_and_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed: Outcome[str] = Outcome(item("a.png"), error=BadAnswer("no"))
    for output in (None, str(tmp_path), str(tmp_path / "out.txt")):
        with open_sink(output, [item("a.png"), item("b.png")], Ocr(), as_json=False) as sink:
            sink.put(failed)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    assert as_dict(failed) == {
        "file": "a.png",
        "page": None,
        "result": None,
        "error": {"code": "bad_answer", "message": "no"},
    }


def test_half_a_file_is_not_left_behind(tmp_path: Path) -> None:
    """A disk that is full, as a limit of 100 bytes a file."""
    found = [item("a.png"), item("b.png")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_sink(str(tmp_path), found, Ocr(), as_json=False) as sink:
        sink.put(Outcome(found[0], result("short")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(InvalidRequest, match=r"cannot write .*b.txt: File too large"):
                sink.put(Outcome(found[1], result("x" * 1000)))
            with pytest.raises(InvalidRequest, match=r"cannot write .*boxes.png: File too large"):
                save(Image.effect_noise((64, 64), 90), tmp_path / "boxes.png")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_stands_between_several(capsys: pytest.CaptureFixture[str]) -> None:
    found = [item("a.png"), item("b.pdf", 2)]
    for task, expected in (
        (Ocr(), "==> a.png <==\nx\n\n==> b.pdf, page 2 <==\nx\n"),
        (ReadTable(to="csv"), "x\n\nx\n"),
        (ReadTable(to="json"), "".join(f'{{"file": {file}, "result": "x"}}\n' for file in FILES)),
    ):  # fmt: skip
        with open_sink(None, found, task, as_json=False) as sink:
            for one in found:
                sink.put(Outcome(one, result("x")))
        assert capsys.readouterr().out == expected


def test_an_input_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "page.txt"
    path.write_text("precious")
    (tmp_path / "link.txt").symlink_to(path)
    for output in (path, tmp_path / "link.txt"):
        with pytest.raises(InvalidRequest, match="is an input"):
            open_sink(str(output), [item(str(path))], Ocr(), as_json=False)
    with open_sink(str(tmp_path), [item(str(path), name="page.txt")], Ocr(), as_json=False) as sink:
        sink.put(Outcome(item(str(path), name="page.txt"), result("new")))
    assert path.read_text() == "precious"
    assert (tmp_path / "page.txt.txt").read_text() == "new\n"
