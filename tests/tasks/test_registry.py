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
from qvl.tasks import registry

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
)


@pytest.mark.parametrize("task", [*registry.TASKS.values(), tasks.Ground(what="x"), tasks.Webpage(), EXTRACT])
def test_an_answer_without_end_ends(task: tasks.Task[Any]) -> None:
    """A small model may say one thing over and over; what takes the square of its length would not end here."""
    for begin in ("", "```\n", "<table><tr><td>", "\\begin{tabular}{", '{"a": '):
        for piece in ENDLESS:
            with contextlib.suppress(BadAnswer):
                task.read(begin + piece * (10_000 // len(piece)))
