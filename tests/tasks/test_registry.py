"""The tasks that a folder can be asked by name."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvl import tasks
from qvl.errors import BadAnswer, ConfigError
from qvl.tasks import loose_json, registry
from tests.tasks.counted import counting

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_is_a_question_about_one_picture() -> None:
    assert {"ocr", "translate", "table", "solve", "describe"} <= set(registry.TASKS)
    for name, task in registry.TASKS.items():
        prompt, fields = registry.question(name)
        assert prompt == task.prompt and "image" in task.accepts
        assert fields == {"temperature": 0.0, "max_tokens": task.max_tokens}


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"'tabel'.*did you mean 'table'"):
        registry.question("tabel")


def test_the_functions_are_found_in_the_package_and_load_no_torch() -> None:
    code = "import sys, qvl; assert callable(qvl.tasks.ocr); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


EXTRACT = tasks.Extract(schema=tasks.Schema.of_fields(["a"]))
READERS = [*registry.TASKS.values(), tasks.Ground(what="x"), tasks.Webpage(), EXTRACT]
ENDLESS = (
    " ",
    "\n",
    "```\n",
    "`",
    "| ",
    "<a ",
    "<td>",
    "{",
    "[",
    "}",
    '"',
    "\\boxed{",
    "(1,2),",
    "Answer: ",
    "&",
    '{"a":',
    "<",
    "</x>",
    "url(",
)
# What an answer may begin with, and what said over and over then is read by a reader of its own.
OPEN = {
    "```\n": ("```\n", "`", " "),
    "<table><tr><td>": ("<td>", "</x>", "<"),
    "\\begin{tabular}{": ("&", "{", "}"),
    '{"a": ': ('"', "{", "["),
    "<style>": ("url(", "@import ", " "),
}


@pytest.mark.parametrize("task", READERS)
def test_an_answer_without_end_ends(task: tasks.Task[Any]) -> None:
    for begin in ("", *OPEN):
        for piece in ENDLESS:
            with contextlib.suppress(BadAnswer):
                task.read(begin + piece * (10_000 // len(piece)))


@pytest.mark.parametrize("task", READERS)
def test_what_is_said_over_and_over_is_read_once(task: tasks.Task[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model may repeat itself: twice as much of it is twice the work; four times where someone starts anew at
    every place."""
    length = 300  # above what the readers look back or ahead at most; the depth of JSON that they follow is made so
    monkeypatch.setattr(loose_json, "_MOST_DEPTH", 10)

    def work(answer: str) -> int:
        with counting(monkeypatch) as counted, contextlib.suppress(BadAnswer):
            task.read(answer)
        return counted.total

    for begin, pieces in {"": ENDLESS, **OPEN}.items():
        for piece in pieces:
            times = length // len(piece)
            once, twice = work(begin + piece * times), work(begin + piece * (2 * times))
            assert twice < 3 * once, (begin, piece, once, twice)
