"""`qvl batch`: flags, who answers, exit codes, what is said on which stream."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from qvl.backends.echo import EchoBackend
from qvl.cli.app import run
from tests.server.live import Live, live

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server at the default address, whatever runs on the developer's machine."""
    monkeypatch.setattr("qvl.cli.batch.DEFAULT_URL", "http://127.0.0.1:9")


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.jsonl"
    lines = [
        {"custom_id": f"job-{i}", "body": {"messages": [{"role": "user", "content": f"Job {i}"}]}} for i in range(5)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for name in ("2.png", "1.jpg", "deep/3.webp"):
        Image.new("RGB", (60, 40), "white").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def texts(path: Path) -> dict[str, str]:
    told = [json.loads(line) for line in path.read_text().splitlines()]
    return {a["custom_id"]: a["response"]["body"]["choices"][0]["message"]["content"] for a in told}


def test_a_file_against_a_server(server: Live, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ["batch", str(jobs), "-o", str(output), "--base-url", server.url]
    assert run(arguments) == 0
    assert texts(output) == {f"job-{i}": f"Job {i}" for i in range(5)}
    out, err = capsys.readouterr()
    assert out == ""
    assert "5 answered, 0 failed" in err
    assert run(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert run([*arguments, "--resume"]) == 0
    assert "5 from an earlier run" in capsys.readouterr().err
    assert run([*arguments, "--overwrite", "--max-tokens", "2", "-q"]) == 0
    assert set(texts(output).values()) == {"Jo"}
    assert capsys.readouterr() == ("", "")


def test_a_folder_against_a_server(server: Live, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "text.jsonl"
    arguments = ["batch", str(pictures), "-o", str(output), "--base-url", server.url, "-q"]
    assert run([*arguments, "--task", "ocr"]) == 0
    assert texts(output) == dict.fromkeys(
        ["1.jpg", "2.png", "deep/3.webp"], "Read all the text in the picture. [1 image]"
    )
    assert run([*arguments, "--prompt", "What colour?", "--overwrite"]) == 0
    assert set(texts(output).values()) == {"What colour? [1 image]"}


def test_the_server_at_the_default_address_is_found(
    server: Live, jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qvl.cli.batch.DEFAULT_URL", server.url)
    assert run(["batch", str(jobs), "-o", str(tmp_path / "out.jsonl"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["answered"], told["answered_by"]) == (5, 5, server.url)
    assert told["completion_tokens"] == sum(len(f"Job {i}") for i in range(5))


@pytest.mark.parametrize("engine", [["--in-process"], []])
def test_without_a_server_the_model_is_loaded_here(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: list[str],
) -> None:
    if engine:
        monkeypatch.setenv("QVL_BASE_URL", "http://127.0.0.1:9")  # a flag counts for more than a variable
    (pictures / "broken.png").write_bytes(b"\x89PNG but not really")
    arguments = [
        "batch",
        str(pictures),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--task",
        "describe",
        "--model",
        str(checkpoint),
    ]
    assert run([*arguments, *engine, "--max-tokens", "4", "--device", "cpu", "--num-threads", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["answered"], told["failed"], told["errors"]) == (3, 1, {"invalid_media": 1})
    assert told["answered_by"].endswith("in process")
    assert "loading" in err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == ["1.jpg", "2.png", "broken.png", "deep/3.webp"]
    assert all(1 <= row["response"]["body"]["usage"]["completion_tokens"] <= 4 for row in rows if not row["error"])


def test_a_failed_line_is_exit_code_1(server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, output = tmp_path / "jobs.jsonl", tmp_path / "out.jsonl"
    jobs.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{broken\n')
    arguments = ["batch", str(jobs), "-o", str(output), "--base-url", server.url]
    assert run(arguments) == 1
    err = capsys.readouterr().err
    assert (
        "that are not requests and recorded as errors: 1\n" in err
        and "1 answered, 1 failed" in err
        and "errors: invalid_value 1" in err
    )
    assert [json.loads(line)["custom_id"] for line in output.read_text().splitlines()] == ["line-1", "line-2"]
    assert run([*arguments, "--resume", "-q"]) == 1  # nothing is asked, but the output still holds a failed line
    jobs.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": [{"role": "user", "content": "2"}]}\n'
    )
    assert run([*arguments, "--retry-failed"]) == 2  # the line says something else now
    assert "line 2 of the input has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.jsonl"], "cannot read"),
        (["{scans}"], "--task"),
        (["{scans}", "--task", "ocrr"], "did you mean 'ocr'"),
        (["{scans}", "--task", "ocr", "--prompt", "x"], "exclude"),
        (["{jobs}", "--task", "ocr"], "folder of pictures"),
        (["{jobs}", "--in-process", "--base-url", "http://x"], "exclude"),
        (["{jobs}", "--resume", "--overwrite"], "exclude"),
        (["{jobs}", "-o", "{jobs}"], "the file of the requests"),
        (["{jobs}", "-o", "/nowhere/out.jsonl"], "no folder"),
        (["{jobs}", "-o", "{taken}", "--resume", "--base-url", "{url}"], "cannot write {taken}.part: Is a directory"),
        (["{jobs}", "--concurrency", "0"], "concurrency"),
        (["{jobs}", "--base-url", "ftp://x"], "no address"),
        (["{double}"], "line 2 repeats"),
        (["{csv}"], "no line of"),
    ],
)
def test_bad_input_is_exit_code_2(
    jobs: Path,
    pictures: Path,
    server: Live,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "double").write_text('{"custom_id": "a"}\n{"custom_id": "a"}\n')
    (tmp_path / "csv").write_text("a,b\n1,2\n")
    (tmp_path / "taken.part").mkdir()
    names = {"scans": pictures, "jobs": jobs, "url": server.url}
    names |= {name: tmp_path / name for name in ("double", "csv", "taken")}
    given = [argument.format_map(names) for argument in arguments]
    output = [] if "-o" in given else ["-o", str(tmp_path / "out.jsonl")]
    assert run(["batch", *given, *output]) == 2
    err = capsys.readouterr().err
    assert says.format_map(names) in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.jsonl.part").exists()


def test_nobody_answers(jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["batch", str(jobs), "-o", str(tmp_path / "o"), "--base-url", "http://127.0.0.1:9"]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert not (tmp_path / "o.part").exists()


def test_ctrl_c_keeps_the_answers_and_says_how_to_go_on(tmp_path: Path) -> None:
    """In a process of its own, with a pipe where people have a terminal."""
    jobs, output = tmp_path / "jobs.jsonl", tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Job {i}"}]}) for i in range(200)]
    jobs.write_text("\n".join(lines))
    with live(EchoBackend("parrot", seconds_per_token=0.05)) as server:
        command = [sys.executable, "-m", "qvl", "batch", str(jobs), "-o", str(output), "--base-url", server.url]
        command += ["--concurrency", "2"]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while not part.exists() or part.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines() == [f"qvl: the answers so far are in {part}; the same command with --resume goes on"]
    with live(EchoBackend("parrot")) as server:
        assert run(["batch", str(jobs), "-o", str(output), "--base-url", server.url, "--resume", "-q"]) == 0
    assert list(texts(output).values()) == [f"Job {i}" for i in range(200)]


def test_the_help_names_every_task() -> None:
    """The list stands in the help as words, so that the command starts without loading the tasks."""
    from qvl.cli.batch import batch
    from qvl.tasks.registry import TASKS

    told = str(inspect.signature(batch, eval_str=True).parameters["task"].annotation.__metadata__[0].help)
    assert {name for name in re.findall(r"[a-z]+", told) if name in TASKS} == set(TASKS)
