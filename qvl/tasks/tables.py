"""`table`: the table in a picture, in the form that is wanted.

Knows the question in both languages. What a table is, is `markdown_table`'s. Does not know files or models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qvl.tasks.base import Ask, Model, Result, Task, asked, cut_notes
from qvl.tasks.markdown_table import Table
from qvl.tasks.run import one
from qvl.tasks.wrappings import fenced
from qvl.types import Part

Format = Literal["markdown", "csv", "html", "json"]
Language = Literal["en", "zh"]

# Words of the bundled checkpoint's training that Qwen2-VL takes as they are.
PROMPTS: dict[Language, str] = {"en": "Convert the table to Markdown.", "zh": "把表格转换成Markdown"}
SUFFIXES: dict[Format, str] = {"markdown": ".md", "csv": ".csv", "html": ".html", "json": ".json"}


@dataclass(frozen=True, kw_only=True)
class ReadTable(Task[Table]):
    """Asked for as Markdown, the form that models write best; `to` is the form it is printed in."""

    name: ClassVar[str] = "table"

    to: Format = "markdown"
    lang: Language = "en"

    @property
    def prompt(self) -> str:
        return PROMPTS[self.lang]

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.to]

    @property
    def several(self) -> Literal["headings", "blank", "json"]:
        forms: dict[Format, Literal["headings", "blank", "json"]] = {"markdown": "headings", "json": "json"}
        return forms.get(self.to, "blank")

    def read(self, answer: str) -> Table:
        return Table.parse(fenced(answer))

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Table]:
        completion = ask(asked(self.prompt, parts), self.sampling)
        table = self.read(completion.text)
        return self.result(table, (*table.repairs, *cut_notes(completion)))

    def text(self, value: Table) -> str:
        if self.to == "json":
            return json.dumps(value.records(), ensure_ascii=False, indent=2)
        return {"markdown": value.markdown, "csv": value.csv, "html": value.html}[self.to]()

    def data(self, value: Table) -> Any:
        return value.records() if self.to == "json" else self.text(value)


def table(source: Any, *, lang: Language = "en", model: Model | None = None, page: int | None = None) -> Table:
    """The table in a picture (`source`, `model` and `page` as for `ocr`); `str` of it is Markdown.

    Its methods give other forms: `csv()`, `html()`, `records()`, and `dataframe()` where pandas is installed. Raises
    `BadAnswer` where the model found none.
    """
    return one(ReadTable(lang=lang), source, model, page)
