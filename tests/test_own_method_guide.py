"""Does the code of the guide "Write your own method" run, from the first line to the last?"""

import re
from pathlib import Path

import pytest
from torch import nn

from rankfold.errors import StoreError
from rankfold.layers import LowRankLinear, _table, methods_for, registered
from rankfold.store import load
from rankfold.testing import CHECKS

PAGE = Path(__file__).parent.parent / "docs" / "write_your_own_method.md"


def run(page, names):
    """Run all blocks of Python on a page in one namespace; errors name the line of the page."""
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    for block in blocks:
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], str(page), "exec"), names)
    return len(blocks)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the page defines, once all of it has run; what it registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    with registered():
        assert run(PAGE, names) == 5
        yield names
    assert "blocks" not in methods_for(nn.Linear(2, 2))


def test_the_class_passes_every_check(names):
    names["test_block_linear"]()


@pytest.mark.parametrize("check", ["errors", "metric"])
def test_its_row_of_tests_can_fail(names, check):
    layer = names["BlockLinear"]
    honest = layer.errors.__func__
    layer.errors = classmethod(lambda cls, *args, **options: tuple(0.9 * e for e in honest(cls, *args, **options)))
    with pytest.raises(AssertionError, match=rf"{check}, Case\("):
        names["test_block_linear"]()
    assert check in CHECKS


def test_the_planner_did_what_the_page_says(names):
    assert type(names["small"][0]) is names["BlockLinear"]
    plan = names["plan"]
    assert plan.params <= 0.4 * plan.dense.params
    ranks = [rank for rank in range(1, 64) if rank * (64 + 192) <= plan.layers["0"].params]
    (error,) = LowRankLinear.errors(names["model"][0], ranks[-1:])
    assert (ranks[-1], round(error, 2)) == (12, 0.47)


def test_the_file_says_what_it_needs(names):
    path = Path("small.safetensors").resolve()
    with registered():
        _table.ENTRIES.pop((nn.Linear, "blocks"))
        with pytest.raises(StoreError, match="registered with rankfold.layers.register, got 'blocks'"):
            load(path, names["make_model"]())
