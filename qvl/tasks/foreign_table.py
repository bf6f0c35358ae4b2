"""Tables that a model wrote as HTML or LaTeX although it was asked for Markdown: rows of cells, all of one width.

Cells that span several columns or rows stand in each of them, as pandas reads them too. Does not know Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser

from qvl.tasks.page import without_half_tag

Rows = list[list[str]]

_MOST_SPAN = 100
_BREAK = "\0"
_LATEX = re.compile(r"\\begin\{(tabular[xy*]?|longtable|array|tblr)\}")
_ARGUMENT = re.compile(r"\s*(?:\[[^\]]*\]|(?=\{))")
_RULES = re.compile(
    r"\\(?:hline|toprule|midrule|bottomrule|endhead|endfirsthead)\b|\\c(?:line|midrule)(?:\([^)]*\))?\{[^}]*\}"
)
_ROW_END = re.compile(r"\\\\(?:\*|\[[^\]]*\])?|\\tabularnewline\b")
_CELL_END = re.compile(r"(?<!\\)&")
_STYLE = re.compile(r"\\(?:textbf|textit|text|texttt|emph|mathbf|mathrm|underline|makecell(?:\[[^\]]*\])?)\s*(?=\{)")
_MULTI = re.compile(r"\\multi(column|row)\s*(?=\{)")
_ESCAPED = re.compile(r"\\([%&$#_{}])")


def html_rows(text: str) -> Rows:
    """The rows of the first `<table>` in a text; none where there is no such thing."""
    start = re.search(r"<table\b", text, re.I)
    if start is None:
        return []
    reader = _TableReader()
    reader.feed(without_half_tag(text[start.start() :]))
    reader.close()
    return _spread(reader.rows)


@dataclass(slots=True)
class _Cell:
    text: str = ""
    wide: int = 1
    high: int = 1


class _TableReader(HTMLParser):
    """The cells of one table, row by row; ends of cells and rows may be missing, as HTML allows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[_Cell]] = []
        self._cell: _Cell | None = None
        self._done = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._done:
            return
        if tag == "tr":
            self.rows.append([])
            self._cell = None
        elif tag in ("td", "th"):
            fields = dict(attrs)
            self._cell = _Cell("", _span(fields.get("colspan")), _span(fields.get("rowspan")))
            self.rows = self.rows or [[]]
            self.rows[-1].append(self._cell)
        elif tag == "br" and self._cell is not None:
            self._cell.text += _BREAK

    def handle_endtag(self, tag: str) -> None:
        self._done = self._done or tag == "table"
        if tag in ("td", "th", "tr"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None and not self._done:
            self._cell.text += data


def _span(value: str | None) -> int:
    return min(int(value), _MOST_SPAN) if value and re.fullmatch("[1-9][0-9]{0,5}", value.strip()) else 1


def _spread(rows: list[list[_Cell]]) -> Rows:
    """Every cell in each place that it covers."""
    spread: Rows = []
    below: dict[tuple[int, int], str] = {}  # what cells above cover
    for y, row in enumerate(rows):
        cells: list[str] = []
        for cell in row:
            _fill(cells, below, y)
            for x in range(len(cells), len(cells) + cell.wide):
                below |= {(y + down, x): cell.text for down in range(1, cell.high)}
            cells += [cell.text] * cell.wide
        _fill(cells, below, y)
        if cells:
            spread.append([_plain(text) for text in cells])
    return spread


def _fill(cells: list[str], below: dict[tuple[int, int], str], y: int) -> None:
    while (text := below.get((y, len(cells)))) is not None:
        cells.append(text)


def _plain(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.split(_BREAK)).strip()


def latex_rows(text: str) -> Rows:
    """The rows of the first LaTeX table in a text; none where there is no such thing."""
    start = _LATEX.search(text)
    if start is None:
        return []
    at = start.end()
    while (argument := _ARGUMENT.match(text, at)) and argument.end() < len(text):
        at = argument.end() if argument[0].strip() else _braced(text, argument.end())[1]
    body = text[at:].partition(f"\\end{{{start[1]}}}")[0]
    rows = (_RULES.sub("", row).strip() for row in _ROW_END.split(body))
    return [[cell for piece in _CELL_END.split(row) for cell in _latex_cells(piece)] for row in rows if row]


def _latex_cells(piece: str) -> Iterator[str]:
    """A cell as text, as often as it has columns. Mathematics stays as it was written."""
    wide = 1
    if multi := _MULTI.search(piece):
        count, end = _braced(piece, multi.end())
        _, end = _braced(piece, end)
        inside, end = _braced(piece, end)
        piece = piece[: multi.start()] + inside + piece[end:]
        wide = _span(count) if multi[1] == "column" else 1
    while style := _STYLE.search(piece):
        inside, end = _braced(piece, style.end())
        piece = piece[: style.start()] + inside + piece[end:]
    yield from [" ".join(_ESCAPED.sub(r"\1", piece).split())] * wide


def _braced(text: str, at: int) -> tuple[str, int]:
    """What stands in the braces that open at the next place that is not blank, and where it goes on. They may nest."""
    begin = at + len(text[at:]) - len(text[at:].lstrip())
    if text[begin : begin + 1] != "{":
        return "", at
    depth = 0
    for end in range(begin, len(text)):
        depth += 0 if text[end - 1 : end] == "\\" else (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin + 1 : end], end + 1
    return text[begin + 1 :], len(text)
