"""What a vision model is used for, each as a function, with a documented question and a checked answer.

    from qvl import tasks
    tasks.ocr("scan.png")
    for outcome in tasks.each(tasks.Ocr(), "scans/", "report.pdf", pages="1-3"): ...

`base` says what a task is; each task is one file; `inputs` finds what is asked about, `run` asks. docs/tasks.md tells
the questions. Imports no torch; a model in this process is loaded only where no server answers.
"""

from __future__ import annotations

from qvl.tasks.base import Model, Result, Task
from qvl.tasks.comparison import Compare, Comparison, compare
from qvl.tasks.description import Describe, describe
from qvl.tasks.fields import Extract, extract
from qvl.tasks.grounding import Ground, ground
from qvl.tasks.markdown_table import Table
from qvl.tasks.run import Outcome, each
from qvl.tasks.schema import Schema
from qvl.tasks.screenshot import Webpage, webpage
from qvl.tasks.solution import Solution, Solve, solve
from qvl.tasks.tables import ReadTable, table
from qvl.tasks.text import Ocr, ocr
from qvl.tasks.text_lines import OcrLines, TextLine, layout, ocr_lines
from qvl.tasks.translation import Translate, translate
from qvl.tasks.watching import Watch, Watched, watch

__all__ = [
    "Compare",
    "Comparison",
    "Describe",
    "Extract",
    "Ground",
    "Model",
    "Ocr",
    "OcrLines",
    "Outcome",
    "ReadTable",
    "Result",
    "Schema",
    "Solution",
    "Solve",
    "Table",
    "Task",
    "TextLine",
    "Translate",
    "Watch",
    "Watched",
    "Webpage",
    "compare",
    "describe",
    "each",
    "extract",
    "ground",
    "layout",
    "ocr",
    "ocr_lines",
    "solve",
    "table",
    "translate",
    "watch",
    "webpage",
]
