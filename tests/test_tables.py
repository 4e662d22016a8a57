"""Are tables aligned in a terminal, and safe in a notebook?"""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold._common import html_table, text_table
from rankfold.stats import CallTime, LayerTime, LayerTimes, Setting
from rankfold.train import Epoch, History

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


# --- what is printed as a table


def stats_of(model, **options):
    return rf.measure(model, [torch.randn(5, 8)], **options)


def test_statistics_print_as_a_table():
    stats = stats_of(nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4)))
    assert str(stats).splitlines() == [
        "layer  kind    params   MACs  calls",
        "-----  ------  ------  -----  -----",
        "0      Linear   2,700  2,400      1",
        "2      Linear   1,204  1,200      1",
        "",
        "whole model: 3,904 params, 3,600 MACs per example (batch of 5)",
    ]


def test_statistics_show_moments_and_times_where_there_are_some():
    stats = stats_of(nn.Linear(8, 4), moments=True)
    layer = LayerTime((CallTime(0.002, 2, ()),))
    times = LayerTimes({"": layer}, 0.005, Setting("eager", 1, "cpu", "a processor", "2.6"), {"x": "too late"})
    text = str(replace(stats, left_out={"y": "never called"}, times=times)).splitlines()
    assert text[0].split() == ["layer", "kind", "params", "MACs", "calls", "inputs", "ms"]
    assert text[2].split() == ["(model)", "Linear", "36", "32", "1", "5", "4"]
    assert text[5:] == [
        "no moments of y: never called",
        "one pass of the whole model: 5 ms (eager, cpu, 1 thread)",
        "no time of x: too late",
    ]


def test_a_history_prints_the_columns_that_have_values():
    rows = (Epoch(1, 1.5, 1.0, 0.5, None, 1e-3, None, 2.04), Epoch(2, 1.25, None, 0.25, None, 5e-4, 0.5, 12.0, 0.75))
    assert str(History(rows, 2)).splitlines() == [
        "epoch    loss    task  distillation  penalty  metric      lr  seconds",
        "-----  ------  ------  ------------  -------  ------  ------  -------",
        "    1  1.5000  1.0000        0.5000                    0.001      2.0",
        "    2  1.2500                0.2500     0.75  0.5000  0.0005     12.0",
        "",
        "weights kept: those of epoch 2",
    ]
    assert str(History((), 0)) == "no epoch was trained"


def test_notebooks_show_the_same_cells():
    model = nn.Sequential(nn.Linear(8, 4))
    history = rf.train.fit(model, [(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))], epochs=2)
    for shown in (stats_of(model), history):
        cells = [[text for _, text in row] for row in Cells(shown._repr_html_()).rows]
        lines = str(shown).splitlines()
        assert [" ".join(row).split() for row in cells] == [line.split() for line in [lines[0], *lines[2:-2]]]


def test_control_characters_reach_no_terminal():
    shown = text_table(("layer",), [("a\nb\x1b[31m",)], left=("layer",))
    assert shown.splitlines()[2] == "a\\nb\\x1b[31m"
