"""Tables that came as HTML or LaTeX: every cell in its place, whatever the writer left out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.errors import BadAnswer
from qvl.tasks.foreign_table import html_rows, latex_rows
from qvl.tasks.markdown_table import Table

CELLS = [["Item", "Price"], ["Apples & pears", "240"]]
LONG_HTML = """<table border=1>
<thead>
<tr><th>Item</th>
<th><b>Price</b></th></tr>
</thead>
<tbody>
<tr><td>Apples
  &amp; pears</td><td> 240 </td></tr>
</tbody>
</table>"""
LONG_LATEX = r"""\begin{table}[h]
\centering
\begin{tabular}{@{}lr@{}}
\toprule
\textbf{Item} & Price \\ \midrule
Apples \& pears & 240 \\[2pt]
\cmidrule(lr){1-2}
\bottomrule
\end{tabular}
\end{table}"""


@pytest.mark.parametrize(
    "text",
    [
        "<table><tr><th>Item</th><th>Price</th></tr><tr><td>Apples &amp; pears</td><td>240</td></tr></table>",
        f"Here:\n{LONG_HTML}\nDone. <table><tr><td>x</table>",
        "<TABLE><TR><TH>Item<TH>Price<TR><TD>Apples & pears<TD>240",  # ends left out, and cut
    ],
)
def test_html(text: str) -> None:
    assert html_rows(text) == CELLS


def test_cells_that_span_several_stand_in_each() -> None:
    text = (
        "<table><tr><td rowspan=2>a</td><td colspan='2'>b</td></tr><tr><td>c</td><td>d<br>e</td></tr>"
        "<tr><td colspan='x'>f</td><td rowspan=9>g</td></tr></table>"
    )
    assert html_rows(text) == [["a", "b", "b"], ["a", "c", "d\ne"], ["f", "g"]]
    assert len(html_rows(f"<table><tr><td colspan={10**9}>a</td></tr></table>")[0]) == 1
    assert len(html_rows("<table><tr><td colspan=9999>a</td></tr></table>")[0]) == 100


@pytest.mark.parametrize(
    "text",
    [
        r"\begin{tabular}{|l|r|}\hline Item & Price \\ \hline Apples \& pears & 240 \\ \hline\end{tabular}",
        LONG_LATEX,
        "\\begin{tabularx}{\\textwidth}[t]{lX}\nItem & Price \\\\\nApples \\& pears & 240\n\\end{tabularx}",
        r"\begin{tabular}{lr} Item & \text{Price} \\ Apples \& pears & 240",  # cut
    ],
)
def test_latex(text: str) -> None:
    assert latex_rows(text) == CELLS


def test_what_stands_in_cells_of_latex() -> None:
    text = (
        r"\begin{tabular}{ccc}\multicolumn{2}{|c|}{\textbf{Sum \textit{total}}} & $\frac{1}{2}$ \\ "
        r"\multirow{2}{*}{a} & b & 5\% \\ & c & \$7\_0 \end{tabular}"
    )
    assert latex_rows(text) == [
        ["Sum total", "Sum total", r"$\frac{1}{2}$"],
        ["a", "b", "5%"],
        ["", "c", "$7_0"],
    ]


@pytest.mark.parametrize(
    "text", ["", "a & b", "<tr><td>a</td></tr>", "<table></table>", r"\begin{itemize}\end{itemize}"]
)
def test_what_is_neither(text: str) -> None:
    assert html_rows(text) == latex_rows(text) == []


def test_they_become_tables_like_others_and_that_is_told() -> None:
    table = Table.parse("<table><tr><th>a<th>b<tr><td>1</table>")
    assert (table.head, table.rows) == (("a", "b"), (("1", ""),))
    assert table.repairs == ("it was written as HTML", "row 1 had 1 of 2 cells")
    assert Table.parse(r"\begin{tabular}{c}a\\1\end{tabular}").repairs == ("it was written as LaTeX",)
    with pytest.raises(BadAnswer, match="row 1 of the table has 2 cells"):
        Table.parse("<table><tr><th>a</tr><tr><td>1<td>2</tr><tr><td>3</tr></table>")


def test_a_table_that_is_drawn() -> None:
    drawn = "+----+---+\n| a  | b |\n+====+===+\n| 1  | 2 |\n+----+---+\n| 3  | 4 |\n+----+---+"
    assert Table.parse(drawn).rows == (("1", "2"), ("3", "4"))


HTML_PIECES = ["<table>", "<tr>", "<td rowspan=3>", "<td colspan=2>", "</td>", "x", "<br>", "</table>"]
LATEX_PIECES = ["\\begin{tabular}", "{c}", "{", "}", "\\multicolumn{2}", "\\textbf", "&", "\\\\", "\\hline"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(HTML_PIECES + LATEX_PIECES), max_size=14).map("".join))
def test_no_answer_breaks_the_readers(text: str) -> None:
    assert all(isinstance(cell, str) for row in html_rows(text) + latex_rows(text) for cell in row)
