"""A table as rows of cells: from Markdown, and to Markdown, CSV, HTML, JSON and pandas.

    Table.parse("| a | b |\\n| --- | --- |\\n| 1 | 2 |").records() == [{"a": "1", "b": "2"}]

Knows how models write tables and where they slip: rows that are too short or too long, a missing rule below the head,
bars inside cells, HTML or LaTeX instead. Does not know models or pictures.
"""

from __future__ import annotations

import csv
import html
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl.errors import BadAnswer, ConfigError
from qvl.tasks.foreign_table import html_rows, latex_rows

if TYPE_CHECKING:
    import pandas

_RULE = re.compile(r"\s*:?-+:?\s*")
_FRAME = re.compile(r"\s*\+(?:[-=]+\+)+\s*")  # between the rows of a table that is drawn
_BREAK = re.compile(r"<br\s*/?>", re.I)
_UNESCAPED_BAR = re.compile(r"(?<!\\)((?:\\\\)*)\|")
_SHOWN = 60  # characters of an answer in a complaint


@dataclass(frozen=True, slots=True)
class Table:
    """Every row has as many cells as the head. `repairs` says what had to be mended to make that so."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    repairs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Table:
        """The first table in `text`: Markdown, else HTML or LaTeX. Raises `BadAnswer` where there is none, or one that
        cannot be trusted."""
        head, body, repairs = _foreign(text) or _markdown(text)
        wide = _width(head, body, repairs)
        rows = tuple(_fitted(row, wide, number, repairs) for number, row in enumerate(body, 1))
        return cls(_fitted(head, wide, 0, repairs), rows, tuple(repairs))

    def markdown(self) -> str:
        """With columns padded to one width, as it is read best in a terminal."""
        lines = [[_as_cell(cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *(shown_width(row[i]) for row in lines)) for i in range(len(self.head))]
        rule = [f"{'-' * width}" for width in widths]
        padded = ([_padded(cell, width) for cell, width in zip(row, widths, strict=True)] for row in lines)
        head, *rows = (f"| {' | '.join(row)} |" for row in padded)
        return "\n".join([head, f"| {' | '.join(rule)} |", *rows])

    def csv(self) -> str:
        """As RFC 4180 has it, but with plain line feeds."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.head, *self.rows])
        return buffer.getvalue()

    def html(self) -> str:
        """A bare `<table>`; everything in the cells is text."""
        return "\n".join(
            [
                "<table>",
                f"  <thead><tr>{_html_cells(self.head, 'th')}</tr></thead>",
                "  <tbody>",
                *(f"    <tr>{_html_cells(row, 'td')}</tr>" for row in self.rows),
                "  </tbody>",
                "</table>",
            ]
        )

    def records(self) -> list[dict[str, str]]:
        """A dict for each row, by unique names of columns."""
        names = self.columns
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    @property
    def columns(self) -> list[str]:
        """The head with every name once: a second "Price" is "Price (2)", an empty one "column 3"."""
        names: list[str] = []
        for number, cell in enumerate(self.head, 1):
            wanted = name = cell or f"column {number}"
            count = 1
            while name in names:
                count += 1
                name = f"{wanted} ({count})"
            names.append(name)
        return names

    def dataframe(self) -> pandas.DataFrame:
        """For pandas, which is no dependency. Cells stay texts: what is a number is for the caller to say."""
        try:
            import pandas
        except ImportError:
            raise ConfigError("pandas is not installed: pip install pandas") from None
        return pandas.DataFrame(list(self.rows), columns=self.columns)

    def __str__(self) -> str:
        return self.markdown()


def _foreign(text: str) -> tuple[list[str], list[list[str]], list[str]] | None:
    """Head, body and repairs of a table in the other forms that models write."""
    for name, rows_of in (("HTML", html_rows), ("LaTeX", latex_rows)):
        rows = rows_of(text)
        if rows:
            return rows[0], rows[1:], [f"it was written as {name}"]
    return None


def _markdown(text: str) -> tuple[list[str], list[list[str]], list[str]]:
    cells = [_cells(line) for line in _table_lines(text)]
    if len(cells) > 1 and _is_rule(cells[1]):
        return cells[0], cells[2:], []
    return cells[0], cells[1:], ["the rule below the head was missing"]


def _table_lines(text: str) -> list[str]:
    """The lines of the first table: those with bars that follow each other, from the one above the rule."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if _FRAME.fullmatch(line):
            continue
        if "|" in line:
            blocks[-1].append(line.strip())
        elif blocks[-1]:
            blocks.append([])
    for block in blocks:
        rule = next((i for i, line in enumerate(block[1:], 1) if _is_rule(_cells(line))), None)
        if rule is not None:
            return block[rule - 1 :]
    for block in blocks:
        if len(block) > 1 and all(line.startswith("|") for line in block):
            return block
    said = " ".join(text.split())
    said = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."
    raise BadAnswer(f'the answer is no table: "{said}"')


def _is_rule(cells: list[str]) -> bool:
    return all(_RULE.fullmatch(cell) for cell in cells)


def _cells(line: str) -> list[str]:
    """The texts between bars; one that is escaped belongs to its cell."""
    line = line.strip().removeprefix("|")
    pieces = _UNESCAPED_BAR.sub(lambda m: m[1] + "\0", line).split("\0")
    if len(pieces) > 1 and not pieces[-1].strip():
        pieces.pop()
    return [_plain(piece) for piece in pieces]


def _plain(cell: str) -> str:
    """What a cell says, without the marks of Markdown around all of it."""
    text = _BREAK.sub("\n", cell.strip()).replace("\\|", "|")
    match = re.fullmatch(r"(\*\*|__|`)(.+)\1", text, re.S)
    return (match[2] if match and match[1] not in match[2] else text).strip()


def _width(head: list[str], body: list[list[str]], repairs: list[str]) -> int:
    """How many columns: the head's, or those of the rows where all of these have more."""
    wide = min(map(_filled, body), default=0)
    if wide > len(head):
        repairs.append(f"the head had {len(head)} of {wide} cells")
        return wide
    return len(head)


def _filled(row: list[str]) -> int:
    """How many cells there are up to the last that says something."""
    return max((i for i, cell in enumerate(row, 1) if cell), default=0)


def _fitted(row: list[str], wide: int, number: int, repairs: list[str]) -> tuple[str, ...]:
    """The row with `wide` cells: empty ones are added, empty ones too many taken away.

    Raises `BadAnswer` for a row with more than that in it: which cell stands where cannot be known.
    """
    if len(row) > wide and not any(row[wide:]):
        row = row[:wide]
    if len(row) > wide:
        raise BadAnswer(f"row {number} of the table has {len(row)} cells where the head has {wide}: {row}")
    if len(row) < wide and number:
        repairs.append(f"row {number} had {len(row)} of {wide} cells")
    return (*row, *[""] * (wide - len(row)))


def _as_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _html_cells(row: tuple[str, ...], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell).replace(chr(10), '<br>')}</{tag}>" for cell in row)


def shown_width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - shown_width(text))
