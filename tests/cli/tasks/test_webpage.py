"""`qvl webpage`: the file is written whatever becomes of the browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qvl.cli.app import run
from qvl.tasks import screenshot
from tests.tasks.scripted import Scripted

HTML = "```html\n<html><body><p>Hello</p></body></html>\n```"


@pytest.fixture
def shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("qvl.cli.tasks.perform.find_model", lambda who, quiet: Scripted([HTML]))
    path = tmp_path / "shot.png"
    Image.new("RGB", (640, 480), "white").save(path)
    return path


def test_a_page_in_a_file(shot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["webpage", str(shot), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr() == ("", "")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<p>Hello</p>" in page


def test_a_page_on_standard_output(shot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["webpage", str(shot)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("</html>")


def test_side_by_side(shot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshot, "render", lambda page, width, height: Image.new("RGB", (width, height), "blue"))
    out, beside = tmp_path / "page.html", tmp_path / "side.png"
    assert run(["webpage", str(shot), "-o", str(out), "--side-by-side", str(beside)]) == 0
    assert Image.open(beside).width > 2 * 640 and out.exists()


def test_without_a_browser_the_page_is_written_all_the_same(
    shot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHROME_PATH", str(tmp_path / "no-browser"))
    out, beside = tmp_path / "page.html", tmp_path / "side.png"
    assert run(["webpage", str(shot), "-o", str(out), "--side-by-side", str(beside)]) == 2
    assert "which is no program" in capsys.readouterr().err
    assert "<p>Hello</p>" in out.read_text() and not beside.exists()


def test_several_go_into_folders(shot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshot, "render", lambda page, width, height: Image.new("RGB", (width, height), "blue"))
    Image.new("RGB", (320, 240), "white").save(tmp_path / "other.png")
    pages, beside = tmp_path / "pages", tmp_path / "beside"
    inputs = [str(shot), str(tmp_path / "other.png")]
    assert run(["webpage", *inputs, "-o", f"{pages}/", "--side-by-side", f"{beside}/"]) == 0
    assert sorted(path.name for path in pages.iterdir()) == ["other.html", "shot.html"]
    assert sorted(path.name for path in beside.iterdir()) == ["other.png", "shot.png"]
