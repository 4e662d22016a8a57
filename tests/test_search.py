"""Does the search end, in a dozen evaluations, at the smallest model that keeps its promise?"""

import json
import math

import numpy as np
import pytest
import torch
from cases_models import convnet, mlp, params, same_state, state
from torch import nn

import rankfold as rf
from rankfold.errors import BudgetError, DataError, PlanError, StoreError
from rankfold.pipeline._scores import Score, monotone, standard_error

X = torch.randn(16, 160)


def decaying(width=160, depth=1):
    """A network whose weights have decaying spectra; of a single layer, each rank is 1.2 % of the parameters."""
    model = mlp(*[width] * (depth + 1))
    with torch.no_grad():
        for layer in model:
            u, _, vh = torch.linalg.svd(layer.weight)
            layer.weight.copy_(u @ torch.diag(0.8 ** torch.arange(float(width))) @ vh)
    return model


def by_size(curve, model):
    """An evaluation that depends on nothing but the share of the parameters that is left."""
    whole, calls = params(model), []

    def evaluate(small):
        calls.append(params(small) / whole)
        return curve(calls[-1])

    evaluate.calls = calls
    return evaluate


CURVES = {
    "line": (lambda share: share, 0.3, 0.7),
    "early fall": (lambda share: 1 - 0.1 * math.exp(-20 * (share - 0.8)), 0.1, 0.8),
    "late fall": (lambda share: 1 - math.exp(-40 * share), 0.01, math.log(100) / 40),
    "step": (lambda share: float(share > 0.4321), 0.5, 0.4321),
}


@pytest.mark.parametrize("case", CURVES)
def test_the_smallest_share_is_found(case):
    curve, max_drop, expected = CURVES[case]
    model = decaying()
    evaluate = by_size(curve, model)
    found = rf.search(model, example=X, evaluate=evaluate, max_drop=max_drop, quantity="params")
    assert expected <= params(found.model) / params(model) < expected + 0.02
    assert evaluate.calls[0] == 1
    assert len(evaluate.calls) == len(found.steps) + 1 <= 12
    assert params(found.model) == found.plan.params
    assert found.dense == curve(1.0)


def test_the_model_is_that_of_compress_and_the_dense_one_is_left_alone():
    model = convnet()
    before, images = state(model), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    evaluate = by_size(lambda share: share, model)
    found = rf.search(model, images, evaluate=evaluate, max_drop=0.5, quantity="params")
    same_state(model, before)
    assert model.training
    assert found.model.training
    small, plan = rf.compress(model, images, budget=found.plan.budget)
    assert plan.layers == found.plan.layers
    torch.testing.assert_close(found.model.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_a_search_is_not_from_scratch():
    with pytest.raises(PlanError, match="init='decompose'"):
        rf.search(decaying(), example=X, max_drop=0.1, evaluate=float, planning=rf.Planning(init="random"))


def test_the_promise_is_kept_on_samples_that_the_search_did_not_see():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u @ torch.diag(3 * 0.9 ** torch.arange(float(len(s)))) @ vh)
    inputs = torch.randn(12_000, 32)
    with torch.no_grad():
        labels = (model(inputs) + 0.3 * torch.randn(12_000, 10)).argmax(1)
    seen, unseen = slice(0, 2000), slice(2000, None)

    def rights(small, part=seen):
        return small(inputs[part]).argmax(1) == labels[part]

    found = rf.search(model, [torch.randn(256, 32)], evaluate=rights, max_drop=0.02, quantity="params")
    with torch.no_grad():
        drop = rights(model, unseen).double().mean() - rights(found.model.eval(), unseen).double().mean()
    assert drop <= 0.02
    assert found.plan.params < 0.9 * found.plan.dense.params
    assert len(found.steps) <= 11


def test_a_lucky_model_between_worse_ones_is_not_taken():
    model = decaying()

    def curve(share):
        return 1.0 if 0.48 < share <= 0.5 else share

    found = rf.search(model, example=X, evaluate=by_size(curve, model), max_drop=0.1, quantity="params")
    lucky = min(found.steps, key=lambda step: abs(step.share - 0.5))
    assert lucky.drop == 0
    assert not lucky.kept
    assert 0.9 <= params(found.model) / params(model) < 0.95


def test_a_margin_asks_for_a_smaller_drop():
    model, order = decaying(), np.random.default_rng(0).permutation(2000)

    def flags(share):
        return order >= round(2000 * (0.1 + 0.9 * (1 - share)))

    shares = {}
    for margin in (0.0, 3.0, 6.0):
        found = rf.search(
            model, example=X, evaluate=by_size(flags, model), max_drop=0.1, quantity="params", margin=margin
        )
        shares[margin] = params(found.model) / params(model)
        (chosen,) = [step for step in found.steps if step.plan is found.plan]
        assert chosen.drop + margin * chosen.error <= 0.1
    assert shares[0.0] < shares[3.0] < shares[6.0]


def test_no_model_keeps_the_promise_and_the_closest_is_named():
    model = decaying()
    with pytest.raises(BudgetError, match=r"closest, with params=0\.\d+, falls by 0\.5"):
        rf.search(
            model, example=X, evaluate=by_size(lambda s: 1 - 0.5 * (s < 1), model), max_drop=0.1, quantity="params"
        )


def test_what_cannot_be_reached_costs_no_evaluation():
    model = decaying()
    evaluate = by_size(lambda _: 1.0, model)
    found = rf.search(model, example=X, evaluate=evaluate, max_drop=0.0, quantity="params")
    with pytest.raises(BudgetError):
        rf.plan(model, budget=rf.Budget(params=params(found.model) / params(model) - 0.006))
    assert len(set(evaluate.calls)) == len(evaluate.calls)


def test_evaluations_are_few_and_the_layers_are_decomposed_once(monkeypatch):
    model, calls = decaying(32, 3), []
    errors = rf.layers.LowRankLinear.errors
    counted = staticmethod(lambda *a, **k: calls.append(1) or errors(*a, **k))
    monkeypatch.setattr(rf.layers.LowRankLinear, "errors", counted)
    evaluate = by_size(lambda share: share, model)
    found = rf.search(model, example=X[:, :32], evaluate=evaluate, max_drop=0.3, quantity="params", evaluations=5)
    assert len(evaluate.calls) == 5
    assert len(calls) == 3
    assert found.plan.params < found.plan.dense.params


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
def test_every_quantity(quantity):
    model = decaying()
    found = rf.search(model, example=X, evaluate=by_size(lambda s: s, model), max_drop=0.4, quantity=quantity)
    assert getattr(found.plan, quantity) < 0.7 * found.plan.dense[quantity]
    assert list(found.plan.budget.limits) == [quantity]


def test_a_latency_measured_above_its_budget_ends_the_search(monkeypatch):
    """Times scatter: the same plan for two budgets, measured slower than both, must not be tried for ever."""
    model = decaying(16)
    slow = rf.planning.Measured(0.52, 1e-3, "as if")
    plan = rf.Plan({"0": rf.Choice("svd", rank=2)}, dense=rf.planning.Amounts(latency=1e-3), measured=slow)

    def planner(*_, **__):
        return lambda _: plan

    monkeypatch.setattr("rankfold.pipeline._search.planner", planner)
    evaluate = by_size(lambda _: 1.0, model)
    found = rf.search(model, example=X[:, :16], evaluate=evaluate, max_drop=0.1, quantity="latency")
    assert len(evaluate.calls) == 2
    assert [step.share for step in found.steps] == [0.52]


def test_evaluate_gets_models_in_eval_mode_without_gradients():
    model, modes = decaying().train(), []

    def evaluate(small):
        modes.append((small.training, torch.is_grad_enabled()))
        return 1.0

    rf.search(model, example=X, evaluate=evaluate, max_drop=0.1)
    assert set(modes) == {(False, False)}
    assert model.training


def test_a_table_can_be_printed():
    model = decaying()
    found = rf.search(model, example=X, evaluate=by_size(lambda s: s, model), max_drop=0.3)
    lines = str(found).splitlines()
    assert "dense" in lines[1]
    assert len(lines) == len(found.steps) + 2
    assert sum("chosen" in line for line in lines) == 1


# what evaluate returns


BAD_SCORES = {
    "NaN": (math.nan, "NaN or Inf"),
    "Inf": (math.inf, "NaN or Inf"),
    "a NaN sample": (torch.tensor([1.0, math.nan]), "NaN or Inf"),
    "nothing": (None, "must return"),
    "text": ("good", "must return"),
    "a matrix": (torch.ones(2, 2), "must return"),
    "no samples": (torch.ones(0), "must return"),
    "a percentage with a count": ((91.5, 1000), "must return"),
    "half a sample": ((0.9, 10.5), "must return"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores_have_their_error(case):
    returned, message = BAD_SCORES[case]
    with pytest.raises(DataError, match=f"{message}.*dense|{message}"):
        rf.search(decaying(), example=X, evaluate=lambda _: returned, max_drop=0.1)


def test_nan_of_a_smaller_model_has_its_error():
    model = decaying()
    with pytest.raises(DataError, match="compressed"):
        rf.search(model, example=X, evaluate=by_size(lambda s: 1.0 if s == 1 else math.nan, model), max_drop=0.1)


def test_other_samples_each_time_are_refused():
    model = decaying()
    with pytest.raises(DataError, match="the same samples"):
        rf.search(model, example=X, evaluate=by_size(lambda s: torch.ones(1000 + (s < 1)), model), max_drop=0.1)


@pytest.mark.parametrize("scores", [(0.9, 100), torch.arange(50) < 45], ids=["count", "samples"])
def test_too_few_samples_are_refused_after_one_evaluation(scores):
    model = decaying()
    evaluate = by_size(lambda _: scores, model)
    with pytest.raises(BudgetError, match="too few"):
        rf.search(model, example=X, evaluate=evaluate, max_drop=0.01)
    assert len(evaluate.calls) == 1
    rf.search(model, example=X, evaluate=evaluate, max_drop=0.01, margin=0)


def test_the_standard_error_is_that_of_many_draws():
    generator = np.random.default_rng(0)
    n, trials = 400, 2000
    both = generator.random((trials, n))
    dense, small = (both > 0.1).astype(float), (both > 0.13) * 1.0
    estimates = [
        standard_error(Score(a.mean(), n, a), Score(b.mean(), n, b)) for a, b in zip(dense, small, strict=True)
    ]
    true = (dense.mean(1) - small.mean(1)).std()
    assert true < np.mean(estimates) < 1.15 * true
    assert standard_error(Score(0.9, n), Score(0.9, n)) == pytest.approx(math.sqrt(0.9 * 0.1 / n), rel=0.02)
    assert standard_error(Score(0.9), Score(0.8)) == 0


def test_monotone_is_the_least_squares_fit():
    values = np.random.default_rng(1).standard_normal(7)
    fitted = np.array(monotone(list(values)))
    assert (np.diff(fitted) <= 1e-12).all()
    # The conditions of the projection onto the cone of falling sequences: sums of residuals from the left are
    # at most zero, and those at the ends of pools are zero.
    sums = np.cumsum(values - fitted)
    assert (sums <= 1e-12).all()
    ends = np.append(np.diff(fitted) < -1e-9, True)
    np.testing.assert_allclose(sums[ends], 0, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [{"max_drop": -0.1}, {"max_drop": math.nan}, {"max_drop": True}, {"max_drop": "1 %"},
     {"max_drop": 0.1, "margin": -1}, {"max_drop": 0.1, "quantity": "flops"}, {"max_drop": 0.1, "evaluations": 1},
     {"max_drop": 0.1, "evaluations": 2.0}],
    ids=str,
)  # fmt: skip
def test_unusable_arguments_are_refused(arguments):
    with pytest.raises(PlanError, match=list(arguments)[-1]):
        rf.search(decaying(), example=X, evaluate=lambda _: 1.0, **arguments)


# going on after an interruption


class Stop(BaseException):
    """An interruption."""


def stopping(evaluate, after):
    def stopped(model):
        if len(evaluate.calls) == after:
            raise Stop
        return evaluate(model)

    return stopped


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_search_goes_on_where_it_stopped(after, tmp_path):
    model = decaying()
    curve, arguments = (lambda s: torch.full((500,), s)), {"max_drop": 0.3, "quantity": "params"}
    expected = rf.search(model, example=X, evaluate=by_size(curve, model), **arguments)
    before, path = by_size(curve, model), tmp_path / "search.json"
    with pytest.raises(Stop):
        rf.search(model, example=X, evaluate=stopping(before, after), resume=path, **arguments)
    rest = by_size(curve, model)
    found = rf.search(model, example=X, evaluate=rest, resume=path, **arguments)
    assert len(before.calls) == after
    assert len(before.calls) + len(rest.calls) == len(expected.steps) + 1
    assert found.steps == expected.steps
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [path]


def test_another_promise_uses_the_same_record(tmp_path):
    model, path = decaying(), tmp_path / "search.json"
    first, second = by_size(lambda s: s, model), by_size(lambda s: s, model)
    rf.search(model, example=X, evaluate=first, max_drop=0.3, resume=path)
    rf.search(model, example=X, evaluate=second, max_drop=0.2, resume=path)
    assert not set(first.calls) & set(second.calls)


def test_the_record_of_another_model_is_refused(tmp_path):
    model, path = decaying(), tmp_path / "search.json"
    rf.search(model, example=X, evaluate=lambda _: 1.0, max_drop=0.3, resume=path)
    with torch.no_grad():
        model[0].weight[3, 4] += 1e-3
    with pytest.raises(StoreError, match=r"search\.json.*another model"):
        rf.search(model, example=X, evaluate=lambda _: 1.0, max_drop=0.3, resume=path)


def broken(**changes):
    good = {"rankfold_search": 1, "settings": {}, "scores": {}}
    return json.dumps({**good, **changes})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", broken(rankfold_search=2), broken(scores=3), broken(scores={"dense": {"value": 1}}),
     broken(settings=3), broken(scores={"dense": {"value": 1, "count": 3, "samples": [1, 2]}})],
)  # fmt: skip
def test_another_file_is_no_record_and_is_left_alone(text, tmp_path):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(StoreError, match=r"search\.json"):
        rf.search(decaying(), example=X, evaluate=lambda _: 1.0, max_drop=0.3, resume=path)
    assert path.read_text() == text
