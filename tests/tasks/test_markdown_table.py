"""Tables: what models write, mended or refused; and every form that they leave in."""

from __future__ import annotations

import csv
import io
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.errors import BadAnswer, ConfigError
from qvl.tasks.markdown_table import Table

PLAIN = "| Item | Price |\n| --- | --- |\n| Apples | 240 |\n| Bread | 315 |"


def test_a_table_as_it_should_be() -> None:
    table = Table.parse(PLAIN)
    assert table == Table(("Item", "Price"), (("Apples", "240"), ("Bread", "315")))
    assert str(table) == (
        "| Item   | Price |\n"
        "| ------ | ----- |\n"
        "| Apples | 240   |\n"
        "| Bread  | 315   |"
    )  # fmt: skip
    assert table.csv() == "Item,Price\nApples,240\nBread,315\n"
    assert table.records() == [{"Item": "Apples", "Price": "240"}, {"Item": "Bread", "Price": "315"}]


@pytest.mark.parametrize(
    "text",
    [
        f"Here is the table:\n\n{PLAIN}\n\nIt has two rows.",
        f"The sum a|b:\n\n{PLAIN}",
        PLAIN.replace("| ---", "|:---").replace("--- |\n| App", "---:|\n| App"),
        "Item | Price\n--- | ---\nApples | 240\nBread | 315",
        PLAIN.replace("Item", "**Item**").replace("240", "`240`"),
        PLAIN.replace("\n", "\r\n"),
        "".join(f"  {line}  \n" for line in PLAIN.splitlines()),
        f"{PLAIN}\n\n| Another | table |\n| --- | --- |\n| 1 | 2 |",
    ],
)
def test_the_many_ways_to_write_it(text: str) -> None:
    table = Table.parse(text)
    assert (table.head, table.rows) == (("Item", "Price"), (("Apples", "240"), ("Bread", "315")))
    assert table.repairs == ()


@pytest.mark.parametrize(
    "text, head, rows, says",
    [
        ("|a|b|\n|-|-|\n|1|", ("a", "b"), (("1", ""),), "row 1 had 1 of 2 cells"),
        ("|a|b|\n|1|2|", ("a", "b"), (("1", "2"),), "rule below the head was missing"),
        ("|a|\n|-|-|\n|1|2|\n|3|4|", ("a", ""), (("1", "2"), ("3", "4")), "head had 1 of 2 cells"),
    ],
)
def test_what_can_be_mended_is_mended_and_told(
    text: str, head: tuple[str, ...], rows: tuple[tuple[str, ...], ...], says: str
) -> None:
    table = Table.parse(text)
    assert (table.head, table.rows) == (head, rows)
    assert says in " ".join(table.repairs)


def test_empty_cells_too_many_are_taken_away() -> None:
    assert Table.parse("|a|b|\n|-|-|\n|1|2| | |").rows == (("1", "2"),)


@pytest.mark.parametrize(
    "text, says",
    [
        ("There is no table.", 'no table: "There is no table."'),
        ("", "no table"),
        ("a | b", "no table"),
        ("|a|b|\n|-|-|\n|1|2|3|\n|1|2|", "row 1 of the table has 3 cells where the head has 2"),
    ],
)
def test_what_cannot_be_trusted_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadAnswer, match=says.replace("|", r"\|")):
        Table.parse(text)


def test_cells_hold_anything() -> None:
    table = Table.parse('|a|\n|-|\n|x \\| y|\n|one<br>two|\n|say "hi", now|\n|<script>|')
    cells = [row[0] for row in table.rows]
    assert cells == ["x | y", "one\ntwo", 'say "hi", now', "<script>"]
    assert [row[0] for row in csv.reader(io.StringIO(table.csv()))][1:] == cells
    assert "<script>" not in table.html() and "&lt;script&gt;" in table.html() and "one<br>two" in table.html()


def test_columns_have_unique_names() -> None:
    table = Table.parse("|x||x|\n|-|-|-|\n|1|2|3|")
    assert table.columns == ["x", "column 2", "x (2)"]
    assert table.records() == [{"x": "1", "column 2": "2", "x (2)": "3"}]


def test_wide_characters_are_counted_as_a_terminal_does() -> None:
    lines = str(Table.parse("|名称|n|\n|-|-|\n|苹果|1|\n|a|22|")).splitlines()
    assert lines == ["| 名称 | n   |", "| ---- | --- |", "| 苹果 | 1   |", "| a    | 22  |"]


def test_a_dataframe_or_a_word_about_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table.parse(PLAIN)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        table.dataframe()


def test_a_dataframe_is_made_of_rows_and_unique_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pandas is given, where it is not there to be tried."""
    made: list[tuple[object, object]] = []
    stand_in = SimpleNamespace(DataFrame=lambda rows, columns: made.append((rows, columns)))
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    Table.parse("|x|x|\n|-|-|\n|1|2|").dataframe()
    assert made == [([("1", "2")], ["x", "x (2)"])]


def test_the_dataframe_of_pandas_holds_the_cells() -> None:
    pytest.importorskip("pandas", reason="pandas is for who asks for its tables")
    frame = Table.parse(PLAIN).dataframe()
    assert list(frame.columns) == ["Item", "Price"]
    assert frame.to_numpy().tolist() == [["Apples", "240"], ["Bread", "315"]]


class Cells(HTMLParser):
    """The texts of th and td, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


cell = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"], exclude_characters="\\*_`|<-:"), max_size=8
).map(lambda text: " ".join(text.split()))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cell, min_size=n, max_size=n), min_size=2, max_size=4)))
def test_every_form_keeps_every_cell(rows: list[list[str]]) -> None:
    """CSV and HTML are read back by other people's readers."""
    table = Table(tuple(rows[0]), tuple(map(tuple, rows[1:])))
    assert list(csv.reader(io.StringIO(table.csv()))) == rows
    reader = Cells()
    reader.feed(table.html())
    assert reader.rows == rows
    assert Table.parse(table.markdown()).csv() == table.csv()
    assert [list(record.values()) for record in table.records()] == rows[1:]
