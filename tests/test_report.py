"""Does a report say what is true of the two models, in every format?"""

import copy
import json

import pytest
import torch
from torch import nn

from rankfold.errors import PlanError, RankfoldError
from rankfold.planning import Budget, Choice, Plan
from rankfold.reports import report
from rankfold.stats import measure
from rankfold.surgery import apply

X = torch.randn(6, 3, 8, 8)
PLAN = Plan(
    {
        "0": Choice("tucker", rank=(4, 2), error=0.25),
        "4": Choice("svd", rank=3, error=0.5),
        "5": Choice("dense", reason="excluded"),
    },
    Budget(params=0.5),
)


def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20), nn.Linear(20, 5)
    )


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = make()
    return model, apply(model, PLAN)


@pytest.fixture(scope="module")
def full(pair):
    return report(*pair, PLAN, example=X, evaluate=lambda model: 0.5 + 0.25 * (model is pair[0]), threads=1)


def test_rows_are_those_of_the_models(pair, full):
    for model, row in zip(pair, full.rows, strict=True):
        assert row.params == sum(p.numel() for p in model.parameters())
        buffers = 2 * 8 * 4 + 8  # running mean and variance, number of batches
        assert row.bytes == 4 * row.params + buffers
        assert row.macs == measure(model, example=X).macs
    assert [row.model for row in full.rows] == ["before", "after"]
    assert full.rows[0].params > full.rows[1].params
    assert [row.accuracy for row in full.rows] == [0.75, 0.5]


def test_latencies_come_from_one_comparison(full):
    before, after = (row.latency for row in full.rows)
    assert set(before.ratios) == {1.0}
    assert len(after.seconds) == len(before.seconds)
    assert after.threads == 1


def test_error_of_a_layer_is_measured_on_its_weight(pair, full):
    model, small = pair
    by_name = {layer.name: layer for layer in full.layers}
    for name in ("0", "4"):
        dense, now = (one[int(name)].weight.detach().double() for one in (model, small))
        assert by_name[name].weight_error == pytest.approx(float((now - dense).norm() / dense.norm()), rel=1e-6)
        assert 0.01 < by_name[name].weight_error < 1
    assert by_name["5"].weight_error is None
    assert by_name["5"].reason == "excluded"
    assert by_name["4"].predicted_error == 0.5


def test_error_follows_training(pair):
    model, small = pair
    drifted = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in drifted[4].parameters():
            parameter.zero_()
    (row,) = [layer for layer in report(model, drifted, PLAN).layers if layer.name == "4"]
    assert row.weight_error == 1.0


def test_layers_show_both_costs(pair, full):
    for layer in full.layers:
        dense, now = (model[int(layer.name)] for model in pair)
        assert layer.params == tuple(sum(p.numel() for p in one.parameters()) for one in (dense, now))
    by_name = {layer.name: layer for layer in full.layers}
    assert by_name["4"].macs == (288 * 20, 3 * (288 + 20))
    assert by_name["5"].macs == (100, 100)


def test_what_was_not_asked_for_is_left_out(pair):
    found = report(*pair, PLAN)
    assert all(row.latency is row.macs is row.accuracy is None for row in found.rows)
    for missing in ("accuracy", "speed-up", "MACs |"):
        assert missing not in found.to_markdown()
    assert report(*pair, PLAN, example=X, latency=False).rows[0].latency is None


def test_the_error_of_the_outputs_is_put_beside_the_predicted_one(pair, full):
    model, small = (copy.deepcopy(one).eval() for one in pair)
    with torch.no_grad():
        wanted, found = model(X).double(), small(X).double()
    expected = float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())
    before, after = full.rows
    assert before.output_error is before.predicted_error is None
    assert after.output_error == pytest.approx(expected, rel=1e-5)
    assert after.predicted_error == PLAN.output_error == pytest.approx((1 - (1 - 0.25**2) * (1 - 0.5**2)) ** 0.5)
    shown = full.to_markdown().split("## Layers")[0]
    assert f"{expected:.3f}" in shown
    assert f"{PLAN.output_error:.3f}" in shown
    other = torch.randn(40, 3, 8, 8)
    again = report(model, small, PLAN, example=X, loader=other.split(20), latency=False).rows[1]
    assert again.output_error != pytest.approx(expected, rel=1e-3)


def test_evaluation_runs_in_eval_mode_without_autograd(pair):
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return 1

    report(*pair, PLAN, evaluate=evaluate)
    assert seen == [(False, False)] * 2
    assert pair[0].training
    assert pair[1].training


def test_conditions_name_no_machine(full):
    assert set(full.conditions) == {"metric", "torch", "device", "dtype", "batch", "runtime", "threads", "rounds"}
    assert (full.conditions["device"], full.conditions["batch"], full.conditions["dtype"]) == ("cpu", 6, "float32")


def test_text_has_every_layer_and_no_control_codes(full):
    text = full.to_text()
    assert "\x1b" not in text
    for layer in full.layers:
        assert any(line.split()[:2] == [layer.name, layer.method] for line in text.splitlines())
    assert "75" in text
    assert "Measured with torch" in text


def test_markdown_is_two_rectangular_tables(full):
    tables = [block.splitlines() for block in full.to_markdown().split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + 2, 2 + 3]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_a_bar_in_a_reason_does_not_break_the_table(pair):
    plan = Plan({"5": Choice("dense", reason="a|b")})
    line = [line for line in report(*pair, plan).to_markdown().splitlines() if line.startswith("| 5")][0]
    assert "a\\|b" in line


def test_json_holds_every_sample(full):
    data = json.loads(full.to_json())
    assert data["rankfold_report"] == 1
    assert data["rows"][1]["params"] == full.rows[1].params
    assert data["rows"][1]["latency"]["seconds"] == list(full.rows[1].latency.seconds)
    assert data["rows"][1]["latency"]["median"] == full.rows[1].latency.median
    assert [layer["name"] for layer in data["layers"]] == ["0", "4", "5"]
    assert data["layers"][0]["rank"] == [4, 2]


@pytest.mark.parametrize(("suffix", "form"), [(".md", "to_markdown"), (".json", "to_json"), (".txt", "to_text")])
def test_the_suffix_says_what_is_saved(full, suffix, form, tmp_path):
    path = full.save(tmp_path / f"report{suffix}")
    assert path.read_text(encoding="utf-8") == getattr(full, form)()


def test_other_suffixes_are_refused(full, tmp_path):
    with pytest.raises(RankfoldError, match=r"\.md, \.json, \.txt, not '\.pdf'"):
        full.save(tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_models_of_another_plan_are_refused(pair):
    with pytest.raises(PlanError, match="model before compression has no layer 'head'"):
        report(*pair, Plan({"head": Choice("svd", rank=2)}))
