"""Does the demo do on real digits what it promises?"""

import pytest
import torch

import rankfold.demo as demo_module
from rankfold.demo import BUDGETS, METHODS, demo, digits, network
from rankfold.store import load, read_plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return demo(out), out


def test_every_method_at_every_budget_keeps_to_it(run):
    (dense, *rows), _ = run
    assert [(row.name, row.budget) for row in rows] == [(name, budget) for budget in BUDGETS for name in METHODS]
    for row in rows:
        assert row.params <= row.budget * dense.params
        assert row.macs < dense.macs


def test_accuracy_is_kept(run):
    (dense, *rows), _ = run
    assert dense.recovered >= 0.98
    for row in rows:
        assert row.recovered >= dense.recovered - 0.02, row


def test_files_hold_the_best_of_the_smallest_models(run):
    (_, *rows), out = run
    assert {file.name for file in out.iterdir()} == {"digits.safetensors", "report.md", "report.png"}
    best = max(row.recovered for row in rows if row.budget == min(BUDGETS))
    data = digits()
    assert data.accuracy(load(out / "digits.safetensors", network())) == best
    assert f"{best:.4g}" in (out / "report.md").read_text(encoding="utf-8")
    assert read_plan(out / "digits.safetensors").budget.params == min(BUDGETS)


def test_same_seed_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "METHODS", {"svd": ("svd",)})
    state = torch.random.get_rng_state()
    runs = [demo(tmp_path / str(run), seed=3, epochs=1, recovery=1) for run in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    numbers = [[(row.params, row.macs, row.one_shot, row.recovered) for row in rows] for rows in runs]
    assert numbers[0] == numbers[1]
    first, second = (load(tmp_path / run / "digits.safetensors", network()).state_dict() for run in ("0", "1"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
