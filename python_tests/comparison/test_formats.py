"""Tables as text that other programs read: nothing is taken for what it is not, and nothing is lost."""

from __future__ import annotations

import csv
import io

from mas_ext.comparison.formats import csv_text, latex, markdown


def test_csv_is_read_as_it_was() -> None:
    table = [["a", "b,c"], ['say "hi"', "two\nlines"], ["", "±"]]
    assert list(csv.reader(io.StringIO(csv_text(table)))) == table


def test_markdown_by_hand() -> None:
    assert markdown([["a", "long"], ["x|y", "1"]]) == (
        "| a    | long |\n| ---- | ---- |\n| x\\|y | 1    |\n"
    )


def test_latex_by_hand() -> None:
    """A minus is one before a number only; ranges, names and powers of ten keep their dashes."""
    table = [
        ["m_1", "%"],
        ["mas-alpha", "-3.5 ± 0.2"],
        ["a&b", "-1, -2"],
        ["c~d^e", "1e-05"],
        ["0-9", "-"],
    ]
    assert latex(table, left=1, notes=["of two\nlines"]).splitlines() == [
        r"% needs \usepackage{booktabs}",
        "% of two lines",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"m\_1 & \% \\",
        r"\midrule",
        r"mas-alpha & $-$3.5 $\pm$ 0.2 \\",
        r"a\&b & $-$1, $-$2 \\",
        r"c\textasciitilde{}d\textasciicircum{}e & 1e-05 \\",
        r"0-9 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_escapes_what_is_special_and_nothing_twice() -> None:
    special = "\\ { } $ # _ % & ~ ^ < > |"
    (row,) = latex([["t"], [special]], left=1).splitlines()[-3:-2]
    assert row == (
        r"\textbackslash{} \{ \} \$ \# \_ \% \& \textasciitilde{} \textasciicircum{} "
        r"\textless{} \textgreater{} \textbar{} \\"
    )
