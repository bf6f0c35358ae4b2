"""table: the bundled checkpoint reads one, in every form; what is no table is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qvl.errors import BadAnswer
from qvl.tasks import ReadTable, each, table
from qvl.tasks.tables import PROMPTS, Format
from tests.tasks.scripted import Scripted

if TYPE_CHECKING:
    from qvl import LLM

ROWS = (("Apples", "240", "6"), ("Bread", "315", "1"), ("Milk", "129", "2"))


@pytest.mark.parametrize("lang", PROMPTS)
def test_the_bundled_checkpoint_reads_a_table(demo: LLM, samples: Path, lang: str) -> None:
    read = table(samples / "table.png", lang=lang, model=demo)  # type: ignore[arg-type]
    assert (read.head, read.rows, read.repairs) == (("Item", "Price", "Count"), ROWS, ())


FORMS: dict[Format, tuple[str, str, str]] = {
    "markdown": ("| a   |\n| --- |\n| 1   |", ".md", "headings"),
    "csv": ("a\n1\n", ".csv", "blank"),
    "html": (
        "<table>\n  <thead><tr><th>a</th></tr></thead>\n  <tbody>\n    <tr><td>1</td></tr>\n  </tbody>\n</table>",
        ".html",
        "blank",
    ),
    "json": (json.dumps([{"a": "1"}], indent=2), ".json", "json"),
}


@pytest.mark.parametrize("to", FORMS)
def test_every_form(samples: Path, to: Format) -> None:
    task = ReadTable(to=to)
    text, suffix, several = FORMS[to]
    [outcome] = each(task, samples / "table.png", model=Scripted(["Here:\n```markdown\n|a|\n|-|\n|1|\n```\nDone."]))
    assert outcome.result is not None
    assert (outcome.result.text, task.suffix, task.several) == (text, suffix, several)
    assert outcome.result.data == ([{"a": "1"}] if to == "json" else text)


def test_repairs_are_told_and_prose_is_an_error(samples: Path) -> None:
    [outcome] = each(ReadTable(), samples / "table.png", model=Scripted(["|a|b|\n|-|-|\n|1|"]))
    assert outcome.result is not None and "1 of 2 cells" in outcome.result.notes[0]
    with pytest.raises(BadAnswer, match="no table"):
        table(samples / "table.png", model=Scripted(["I see no table."]))
