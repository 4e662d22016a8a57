"""Do plans and reports become pictures that show every layer?"""

import sys

import pytest
import torch
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.planning import Amounts, Choice, Plan
from rankfold.plots import plot_plan, plot_report
from rankfold.reports import report
from rankfold.surgery import apply

PLAN = Plan(
    {
        "first": Choice("tucker", rank=(4, 2), error=0.25, amounts=Amounts(200)),
        "second": Choice("svd", rank=3, error=0.5, amounts=Amounts(100)),
        "third": Choice("dense", reason="excluded", amounts=Amounts(105)),
    }
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Linear(8, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.third(self.second(self.first(x).mean((2, 3))))


@pytest.fixture(scope="module")
def found():
    model = Net()
    return report(model, apply(model, PLAN), PLAN, example=torch.randn(2, 3, 8, 8), evaluate=lambda _: 0.9, threads=1)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")], ids=lambda v: str(v)
)
def test_formats(found, suffix, start, tmp_path):
    for path in (plot_report(found, tmp_path / f"a{suffix}"), plot_plan(PLAN, tmp_path / f"b{suffix}")):
        assert path.read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


def svg_text(path):
    """Return the words of a picture; matplotlib leaves each as a comment beside its outline."""
    return [line[5:-4] for line in path.read_text().splitlines() if line.strip().startswith("<!-- ")] or [
        line.strip()[5:-4] for line in path.read_text().splitlines() if "<!--" in line
    ]


def test_plan_picture_names_every_layer_and_method(tmp_path):
    text = " ".join(svg_text(plot_plan(PLAN, tmp_path / "a.svg")))
    for word in ("first", "second", "third", "tucker", "svd", "dense"):
        assert word in text


def test_report_picture_names_changed_layers_and_what_was_measured(found, tmp_path):
    text = " ".join(svg_text(plot_report(found, tmp_path / "a.svg")))
    for word in ("first", "second", "parameters", "MACs", "latency", "accuracy", "0.9"):
        assert word in text
    assert "third" not in text


def test_report_without_measurements_is_drawn(tmp_path):
    model = Net()
    dense = Plan({"third": Choice("dense")})
    text = " ".join(svg_text(plot_report(report(model, apply(model, dense), dense), tmp_path / "a.svg")))
    assert "parameters" in text
    assert "latency" not in text


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(RankfoldError, match="got 'docx'"):
        plot_plan(PLAN, tmp_path / "a.docx")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RankfoldError, match=r"pip install 'rankfold\[plots\]'"):
        plot_plan(PLAN, tmp_path / "a.png")
