"""What every task's command shares: who answers, what goes where, failures, exit codes. Tried with `qvl ocr`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from qvl.backends.echo import EchoBackend
from qvl.cli.app import run
from qvl.errors import QvlError, Unavailable
from qvl.types import Delta, SamplingParams, Usage
from tests.cli.tasks.terminal import Terminal
from tests.server.live import Live, live
from tests.tasks import documents
from tests.tasks.scripted import Messages

ROOT = Path(__file__).resolve().parents[3]
ECHO = "Read all the text in the picture. [1 image]"


@pytest.fixture(autouse=True)
def asked(server: Live, plain_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, and no server of the developer's."""
    monkeypatch.setenv("QVL_BASE_URL", server.url)
    monkeypatch.setattr("qvl.cli.tasks.perform.DEFAULT_URL", "http://127.0.0.1:9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "a.jpg", "deep/b.png"):
        Image.new("RGB", (60, 40), "white").save(folder / name)
    (folder / "two.pdf").write_bytes(documents.pdf_of([documents.printed("a"), documents.printed("b")]))
    return folder


def piped(data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "qvl", *arguments], cwd=ROOT, input=data, capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_one_picture_is_its_text_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ocr", str(folder / "a.png")]) == 0
    assert capsys.readouterr() == (f"{ECHO}\n", "")


class Watched:
    """A model that looks at the terminal before each piece of its answer."""

    def __init__(self, *pieces: str | QvlError) -> None:
        self.pieces = pieces
        self.seen: list[str] = []

    def stream(self, messages: Messages, sampling: SamplingParams, /) -> Iterator[Delta]:
        for piece in self.pieces:
            self.seen.append(sys.stdout.getvalue())  # type: ignore[attr-defined]
            if isinstance(piece, QvlError):
                raise piece
            yield Delta(0, piece)
        yield Delta(0, "", (), None, "stop", None, Usage())


def in_terminal(monkeypatch: pytest.MonkeyPatch, model: Watched, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("qvl.cli.tasks.perform.find_model", lambda who, quiet: model)
    monkeypatch.setattr(sys, "stdout", Terminal())
    return run(arguments), sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_one_answer_as_it_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Watched("```\n", "OPEN  ", "\n8 to", " 17\n``", "`")
    assert in_terminal(monkeypatch, model, "ocr", str(folder / "a.png")) == (0, "OPEN\n8 to 17\n")
    assert model.seen == ["", "", "OPEN", "OPEN\n8 to", "OPEN\n8 to 17"]


def test_an_answer_that_ends_as_another_is_shown_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence at its beginning turns out to be part of it."""
    model = Watched("```\nOPEN", "\n```\nand more")
    told = in_terminal(monkeypatch, model, "ocr", str(folder / "a.png"))
    assert told == (0, "OPEN\n\n```\nOPEN\n```\nand more\n")


@pytest.mark.parametrize("how", [["--json"], ["-o", "{folder}/a.txt"], ["{folder}/a.jpg"]])
def test_what_is_for_a_program_or_of_many_comes_whole(
    how: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Watched("OPEN", " ", "now")
    words = [word.format(folder=folder) for word in how]
    assert in_terminal(monkeypatch, model, "ocr", str(folder / "a.png"), *words, "--concurrency", "1")[0] == 0
    assert model.seen[:3] == ["", "", ""]


def test_an_error_behind_half_an_answer_has_its_own_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Watched("OPEN", " to", Unavailable("the engine has died"))
    assert in_terminal(monkeypatch, model, "ocr", str(folder / "a.png")) == (1, "OPEN to\n")
    assert capsys.readouterr().err == "qvl: the engine has died\n"


def test_several_have_headings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ocr", str(folder), "--pages", "2"]) == 0
    out, err = capsys.readouterr()
    heads = [f"==> {folder}/{name} <==" for name in ("a.jpg", "a.png", "two.pdf, page 2", "deep/b.png")]
    assert out == "\n".join(f"{head}\n{ECHO}\n" for head in heads)
    assert err == ""


def test_lines_of_json_hold_failures_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.png").write_bytes(b"\x89PNG but not really")
    assert run(["ocr", str(folder / "a.jpg"), "nope.png", str(folder / "two.pdf"), "--json"]) == 1
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert [(line["page"], line["result"]) for line in told] == [(None, ECHO), (None, None), (1, ECHO), (2, ECHO)]
    assert told[1]["file"] == "nope.png" and "no such file" in told[1]["error"]["message"]
    assert err.splitlines() == ["qvl: 1 of 4 failed:", "qvl:   nope.png: no such file: nope.png"]


def test_nothing_that_can_be_read_is_told_without_asking_anybody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QVL_BASE_URL", "http://127.0.0.1:9")
    assert run(["ocr", "nope.png"]) == 2
    assert capsys.readouterr().err == "qvl: no such file: nope.png\n"
    assert run(["ocr", "nope.png", "nor.png", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["file"] for line in out.splitlines()] == ["nope.png", "nor.png"]
    assert "2 of 2 failed" in err
    assert run(["ocr", __file__]) == 1
    assert "no server answers" in capsys.readouterr().err


def test_into_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.txt"
    assert run(["ocr", str(folder / "a.png"), "-o", str(output)]) == 0
    assert output.read_text() == f"{ECHO}\n"
    assert capsys.readouterr() == ("", "")
    assert run(["ocr", str(folder / "a.png"), "-o", str(folder / "a.png")]) == 2
    assert "is an input" in capsys.readouterr().err
    assert run(["ocr", str(folder / "a.png"), "-o", str(tmp_path / "no" / "out.txt")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert run(["ocr", "nope.png", "-o", str(tmp_path / "never.txt")]) == 2
    assert not (tmp_path / "never.txt").exists()


def test_into_a_folder(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "texts"
    assert run(["ocr", str(folder), "-q", "-o", f"{output}/"]) == 0
    written = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert written == ["a.png.txt", "a.txt", "deep/b.txt", "two-001.txt", "two-002.txt"]
    assert {path.read_text() for path in output.rglob("*.txt")} == {f"{ECHO}\n"}
    assert run(["ocr", str(folder / "a.png"), "--json", "-o", str(output)]) == 0
    assert json.loads((output / "a.json").read_text())["result"] == ECHO


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["{scans}/a.png", "--pages", "1"], "--pages is for PDFs"),
        (["{scans}/two.pdf", "--pages", "x"], "names no pages"),
        (["{scans}/two.pdf", "--pages", "3"], "the PDF has 2 pages"),
        (["{scans}/two.pdf", "--dpi", "2"], "--dpi"),
        (["{scans}/a.png", "--concurrency", "0"], "--concurrency"),
        (["{scans}/a.png", "--model", "nightingale"], "nightingale"),
        (["{locked}"], "locked.pdf: the PDF is locked with a password"),
        (["{broken}"], "broken.pdf: the PDF is broken"),
        (["{scans}/nope.png"], "qvl: no such file: "),
        (["data:image/png;base64," + 400 * "!"], f"qvl: data:image/png;base64,{38 * '!'}...: "),
        (["{scans}/empty"], "no pictures and PDFs in the folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (tmp_path / "locked.pdf").write_bytes(documents.locked())
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and no more")
    (folder / "empty").mkdir()
    names = {"scans": folder, "locked": tmp_path / "locked.pdf", "broken": tmp_path / "broken.pdf"}
    assert run(["ocr", *(argument.format_map(names) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


def test_standard_input(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    for arguments in (["ocr"], ["ocr", "-"]):
        assert piped(data, *arguments).stdout.decode() == f"{ECHO}\n"
    pages = piped((folder / "two.pdf").read_bytes(), "ocr", "--json").stdout.decode().splitlines()
    assert [(json.loads(line)["file"], json.loads(line)["page"]) for line in pages] == [("-", 1), ("-", 2)]
    with open(os.devnull, "rb") as nothing:
        done = subprocess.run(
            [sys.executable, "-m", "qvl", "ocr"], cwd=ROOT, stdin=nothing, capture_output=True, timeout=120,
            check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, b"qvl: name a picture: qvl ocr FILE\n")


def test_remarks_are_on_stderr_and_quiet_leaves_them_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ocr", str(folder / "a.png"), "--max-tokens", "4"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Read\n", "qvl: the answer was cut at its length (--max-tokens allows more)\n")
    assert run([*arguments, "-q"]) == 0
    assert capsys.readouterr() == ("Read\n", "")


@pytest.mark.parametrize("named", [False, True])
def test_without_a_server_the_model_is_loaded_here(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: bool,
    server: Live,
) -> None:  # fmt: skip
    """Where none answers, and where the one that answers does not have the model."""
    monkeypatch.delenv("QVL_BASE_URL")
    if named:
        monkeypatch.setattr("qvl.cli.tasks.perform.DEFAULT_URL", server.url)
    assert run(["ocr", str(folder / "a.png"), "--model", str(checkpoint), "--max-tokens", "3"]) == 0
    assert "loading" in capsys.readouterr().err


def test_the_server_at_the_default_address_is_found(
    server: Live, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QVL_BASE_URL")
    monkeypatch.setattr("qvl.cli.tasks.perform.DEFAULT_URL", server.url)
    assert run(["ocr", str(folder / "a.png")]) == 0
    assert capsys.readouterr() == (f"{ECHO}\n", "")


def test_ctrl_c_ends_it_and_what_was_written_stays(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, with a pipe where people have a terminal."""
    output = tmp_path / "out.jsonl"
    for i in range(30):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    with live(EchoBackend("parrot", seconds_per_token=0.01)) as slow:
        command = [sys.executable, "-m", "qvl", "ocr", str(folder), "--json", "-o", str(output)]
        environment = {**os.environ, "QVL_BASE_URL": slow.url}
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment, text=True)
        end = time.monotonic() + 120
        while not output.exists() or output.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        pressed, err = press_until_it_ends(process)
    assert process.returncode == 130
    assert err == "" or pressed > 1
    assert all(json.loads(line)["result"] == ECHO for line in output.read_text().splitlines())


def press_until_it_ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How often, and what was said: CPython may lose an interrupt that comes while it cleans up an object."""
    for pressed in range(1, 10):
        process.send_signal(signal.SIGINT)
        try:
            return pressed, process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    raise AssertionError("Ctrl-C does not end it")
