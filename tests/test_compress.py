"""Does one call give a smaller model that runs, trains and is what its plan says?"""

import pytest
import torch
from cases_models import CalledTwice, Tied, WithDict, convnet, encoder, params, told
from torch.utils.data import DataLoader, TensorDataset

import rankfold as rf
from rankfold.errors import PlanError

IMAGES = torch.randn(4, 3, 8, 8)
MODELS = {
    "convnet": (convnet(), IMAGES),
    "called twice": (CalledTwice(), torch.randn(2, 32)),
    "tied": (Tied(), torch.zeros(2, 3, dtype=torch.long)),
    "dict": (WithDict(), {"x": torch.randn(2, 24), "scale": 0.5}),
    "transformer": (encoder(), torch.randn(2, 5, 32)),
}


def call(model, example):
    output = model(**example) if isinstance(example, dict) else model(example)
    return output["y"] if isinstance(output, dict) else output


@pytest.mark.parametrize("case", MODELS)
def test_smaller_and_trainable(case):
    model, example = MODELS[case]
    small, plan = rf.compress(model, example=example, budget=rf.Budget(params=0.9))
    assert params(small) == plan.params <= 0.9 * params(model)
    call(small, example).square().sum().backward()
    used = {name for name, choice in plan.layers.items() if choice.method != "dense"}
    assert used
    for name in used:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in small.get_submodule(name).parameters()), name


def test_it_is_measure_plan_apply():
    model = convnet()
    budget = rf.Budget(macs=0.4)
    arguments = {"methods": ("svd", "cp"), "rule": "uniform", "exclude": "10", "multiple": 2, "seed": 3}
    small, plan = rf.compress(model, example=IMAGES, budget=budget, **told(**arguments))
    expected = rf.plan(model, budget=budget, stats=rf.measure(model, example=IMAGES), **told(**arguments))
    assert plan == expected
    torch.testing.assert_close(small.state_dict(), rf.apply(model, expected).state_dict(), rtol=0, atol=0)


def test_a_loader_will_do():
    loader = DataLoader(TensorDataset(IMAGES, torch.zeros(4)), batch_size=2)
    _, plan = rf.compress(convnet(), loader, budget=rf.Budget(macs=0.5))
    assert plan.macs <= 0.5 * plan.dense.macs


def test_more_budget_less_error():
    model = convnet()
    errors = [rf.compress(model, example=IMAGES, budget=rf.Budget(params=x))[1].error for x in (0.2, 0.4, 0.6, 0.8, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_what_is_low_rank_is_found():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 4) @ torch.randn(4, 64))
    small, plan = rf.compress(model, example=torch.ones(1, 64), budget=rf.Budget(params=0.57))
    assert plan.layers["0"].rank == 4
    assert plan.layers["1"].method == "dense"
    x = torch.randn(8, 64)
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"loader": [], "budget": rf.Budget(params=0.5)}, rf.RankfoldError),
        ({"example": IMAGES, "budget": rf.Budget(params=0.001)}, rf.BudgetError),
        ({"example": IMAGES, "budget": rf.Budget(params=0.5), "include": "nose"}, PlanError),
        ({"example": IMAGES}, PlanError),
        ({"budget": rf.Budget(params=0.5)}, rf.RankfoldError),
    ],
    ids=["empty loader", "impossible budget", "unknown layer", "no budget", "no data"],
)
def test_bad_input_has_its_error(arguments, error):
    with pytest.raises(error):
        rf.compress(convnet(), **arguments)
