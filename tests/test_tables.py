"""Are tables aligned in a terminal, and safe in a notebook?"""

from html.parser import HTMLParser

import pytest

from rankfold._common import html_table, text_table

HEADS = ("layer", "params", "reason")
LEFT = ("layer", "reason")
ROWS = [("conv", "1,200", ""), ("a<b> & 'c'", "7", 'said "no"')]


class Cells(HTMLParser):
    """Every cell with its style, and every tag that is left open."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([dict(attrs)["style"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1][1] += data
        else:
            self.texts.append(data)


def test_words_are_flush_left_and_numbers_flush_right():
    assert text_table(HEADS, ROWS, left=LEFT).splitlines() == [
        "layer       params  reason",
        "----------  ------  ---------",
        "conv         1,200",
        "a<b> & 'c'       7  said \"no\"",
    ]


def test_a_table_without_rows_is_its_head():
    assert text_table(("a", "bc"), []).splitlines() == ["a  bc", "-  --"]


def test_html_has_the_same_cells_escaped():
    found = Cells(html_table(HEADS, ROWS, left=LEFT, caption="<b>", below=["1 < 2", "3"]))
    assert found.open == []
    assert [[text for _, text in row] for row in found.rows] == [list(row) for row in [HEADS, *ROWS]]
    for row in found.rows:
        assert [style for style, _ in row] == [f"text-align: {side}" for side in ("left", "right", "left")]
    assert found.texts == ["<b>", "1 < 2", "3"]


@pytest.mark.parametrize("table", [text_table, html_table])
def test_a_row_of_another_length_is_no_row(table):
    with pytest.raises(ValueError, match="zip"):
        table(HEADS, [("conv", "1")])
