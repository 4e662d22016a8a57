"""Is `plan` and then `compress(plan=)` the very model and plan that `compress(budget=)` makes, through JSON too?"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from cases_models import Attention, Tied, WithDict, convnet, mlp
from cases_timing import FakeClock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import rankfold as rf
from rankfold.cli import app
from rankfold.latency import Timing
from rankfold.latency import _layers as timings
from rankfold.pipeline import _latency_check as promises

BATCHES, ROWS = 2, 6


def block() -> nn.Sequential:
    """An affine block with an activation inside, for a flexible layer."""
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def mixed() -> nn.Sequential:
    """A convnet with running statistics that are not those of its data, so that re-estimating them changes it."""
    model = convnet(4)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def attention() -> nn.Module:
    """An attention whose projections are layers that a plan can name."""
    return rf.separate_attention(Attention())


def _normal(*shape):
    return lambda: torch.randn(ROWS, *shape)


MODELS = {  # how to make one, and a batch of its inputs
    "convnet": (mixed, _normal(3, 10, 10)),
    "mlp": (lambda: mlp(24, 32, 24, 5), _normal(24)),
    "tied": (Tied, lambda: torch.randint(0, 50, (ROWS, 7))),
    "attention": (attention, _normal(9, 32)),
    "whole attention": (Attention, _normal(9, 32)),
    "dict": (WithDict, lambda: {"x": torch.randn(ROWS, 24), "scale": torch.ones(ROWS, 1)}),
    "block": (block, _normal(8)),
}
BUDGETS = {
    "params": rf.Budget(params=0.6),
    "many params": rf.Budget(params=0.9),
    "macs": rf.Budget(macs=0.6),
    "bytes": rf.Budget(bytes=0.7),
    "latency": rf.Budget(latency=0.7),
    "params and macs": rf.Budget(params=0.7, macs=0.6),
    "macs and latency": rf.Budget(macs=0.8, latency=0.7),
}


def spread(output, target):
    """A loss of whatever a model returns."""
    found = next(iter(output.values())) if isinstance(output, dict) else output
    return F.mse_loss(found, torch.ones_like(found))


def some_tokens(batch):
    """Half of the tokens count: any mask, as long as it depends on nothing but the batch."""
    inputs = batch[0] if isinstance(batch, list | tuple) else next(iter(batch.values()))
    return torch.arange(inputs.shape[1]).expand(len(inputs), -1) % 2 == 0


PLANNINGS = {
    "usual": rf.Planning(),
    "weights": rf.Planning(metric="weights"),
    "fisher": rf.Planning(metric="fisher", loss=spread),
    "loss": rf.Planning(metric="fisher", objective="loss", loss=spread, recalibrate=False),
    "whitening": rf.Planning(metric="whitening", methods="svd"),
    "all of three": rf.Planning(methods=("svd", "tucker", "cp"), seed=3),
    "tt": rf.Planning(methods=("svd", "tt"), objective="squares"),
    "uniform": rf.Planning(rule="uniform", methods="svd"),
    "energy": rf.Planning(rule="energy", methods="svd"),
    "not fitted": rf.Planning(recalibrate=False, batchnorm=False),
    "few batches": rf.Planning(batches=1, multiple=2),
    "masked": rf.Planning(mask=some_tokens),
    "from scratch": rf.Planning(init="random", rule="uniform", seed=7),
}
DATA = ("loader", "iterator", "example", "loader and example", "stats", "loader and stats")


def batches(make):
    """The same batches each time, with targets where they are no mappings."""
    torch.manual_seed(1)
    found = [make() for _ in range(BATCHES)]
    return [batch if isinstance(batch, dict) else (batch, torch.zeros(ROWS)) for batch in found]


def sources(model, data, kind, planning):
    """Return a function to the arguments that give the data: a fresh iterator each time."""
    inputs = data[0] if isinstance(data[0], dict) else data[0][0]
    if "stats" in kind:
        how = {name: getattr(planning, name) for name in ("batches", "mask", "loss")}
        stats = rf.measure(model, data, moments=True, **how)
        return lambda: {"stats": stats, **({"loader": data} if "loader" in kind else {})}
    given = {
        "loader": lambda: {"loader": data},
        "iterator": lambda: {"loader": iter(data)},
        "example": lambda: {"example": inputs},
        "loader and example": lambda: {"loader": data, "example": inputs},
    }
    return given[kind]


def result(call):
    """Return what a call returns, or type and words of what it refuses with."""
    try:
        return call()
    except rf.RankfoldError as error:
        return type(error).__name__, str(error)


def same(one, other):
    """Assert that two models and plans are the same to the last bit."""
    (small, plan), (twin, again) = one, other
    assert plan == again
    first, second = small.state_dict(), twin.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def from_json(plan):
    """Return a plan that was text in between, with the functions that JSON can't hold given again."""
    read = rf.Plan.from_json(plan.to_json())
    missing = {name: getattr(plan.planning, name) for name in read.planning.missing}
    return read, {"planning": dataclasses.replace(read.planning, **missing, missing=())} if missing else {}


def one_road(name, budget, kind, planning):
    """Assert for one case that both roads lead to the same place; return what is there."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model, limits = make().eval(), BUDGETS[budget]
    source = sources(model, batches(batch), kind, planning)
    how = {"budget": limits, "planning": planning}
    if limits.latency is not None:
        how["timing"] = Timing(cache=False)
    whole = result(lambda: rf.compress(model, **source(), **how))
    plan = result(lambda: rf.plan(model, **source(), **how))
    if not isinstance(plan, rf.Plan):  # neither half of the road is open where the whole is not
        assert whole == plan
        return whole
    same(whole, (whole[0], plan))
    same(whole, rf.compress(model, **source(), plan=plan))
    read, given_again = from_json(plan)
    assert read.layers == plan.layers
    small, counted = rf.compress(model, **source(), plan=read, **given_again)
    same(whole, (small, dataclasses.replace(counted, planning=plan.planning)))
    return whole


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    fake = FakeClock(lambda model: 1e-7 + 1e-9 * sum(p.numel() for p in model.parameters()))
    monkeypatch.setattr(timings, "time_models", fake)
    monkeypatch.setattr(promises, "time_models", fake)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", MODELS)
def test_whatever_the_model_and_its_data(name, kind):
    small, plan = one_road(name, "many params" if "whole" in name else "params", kind, rf.Planning())
    assert any(choice.method != "dense" for choice in plan.layers.values())
    assert sum(p.numel() for p in small.parameters()) == plan.params


@pytest.mark.parametrize("how", PLANNINGS)
def test_whatever_the_options(how):
    name = "attention" if how == "masked" else "convnet"
    found = one_road(name, "macs", "loader", PLANNINGS[how])
    assert isinstance(found[1], rf.Plan), found


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["loader", "example"])
def test_whatever_the_budget(budget, kind):
    found = one_road("convnet", budget, kind, rf.Planning())
    assert isinstance(found[1], rf.Plan), found
    assert (found[1].measured is not None) == ("latency" in budget)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(MODELS)),
    budget=st.sampled_from(sorted(BUDGETS)),
    kind=st.sampled_from(DATA),
    how=st.sampled_from(sorted(PLANNINGS)),
)
@example(name="tied", budget="latency", kind="loader", how="fisher")
@example(name="attention", budget="latency", kind="iterator", how="usual")
@example(name="mlp", budget="macs", kind="example", how="from scratch")
def test_whatever_goes_together(name, budget, kind, how):
    one_road(name, budget, kind, PLANNINGS[how])


def test_with_a_flexible_layer_for_a_block():
    model, data = block().eval(), batches(MODELS["block"][1])
    planning = rf.Planning(blocks="0:2", methods="svd")
    small, plan = rf.compress(model, data, budget=rf.Budget(params=0.6), planning=planning)
    assert plan["0:2"].method == "flexible"
    same((small, plan), rf.compress(model, iter(data), plan=rf.Plan.from_json(plan.to_json())))


def test_with_the_short_forms():
    model, data = mixed().eval(), batches(MODELS["convnet"][1])
    how = {"budget": rf.Budget(params=0.7), "methods": "svd", "exclude": "0", "include": ["?", "1*"]}
    plan = rf.plan(model, data, **how)
    assert plan["0"].method == "dense"
    same(rf.compress(model, data, **how), rf.compress(model, data, plan=plan))


def test_what_a_search_finds_is_what_its_plan_makes():
    model, data = mixed().eval(), batches(MODELS["convnet"][1])
    inputs = torch.cat([batch for batch, _ in data])
    wanted = model(inputs).detach()

    def score(small):
        return -float((small(inputs) - wanted).norm() / wanted.norm())

    planning = rf.Planning(methods="svd", seed=2)
    found = rf.search(model, data, evaluate=score, max_drop=0.3, evaluations=4, planning=planning)
    same((found.model, found.plan), rf.compress(model, data, plan=found.plan))


SHOP = """
import torch
from test_one_road import batches, mixed, MODELS

def model():
    torch.manual_seed(0)
    return mixed().eval()

def data():
    return batches(MODELS["convnet"][1])

def stream():
    yield from data()
"""
SHELL = {
    "example": ("--example", "2,3,10,10"),
    "data": ("--data", "shop:data"),
    "a stream of data, one batch of it": ("--data", "shop:stream", "--batches", "1"),
    "other options": ("--data", "shop:data", "--methods", "tucker", "--seed", "5", "--no-recalibrate"),
    "on weights": ("--data", "shop:data", "--metric", "weights", "--rule", "energy", "--multiple", "2"),
}


@pytest.mark.parametrize("how", SHELL)
def test_from_the_shell(how, tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)

    def done(command, *words):
        found = CliRunner().invoke(app, [command, "shop:model", *words])
        assert found.exit_code == 0, (found.stderr, found.exception)

    budget, words = ("--macs", "0.7"), SHELL[how]
    source = words[:2]
    done("compress", *words, *budget, "--out", "whole.safetensors")
    done("plan", *words, *budget, "--out", "plan.json")
    done("compress", *source, "--plan", "plan.json", "--out", "halves.safetensors")
    assert Path("whole.safetensors").read_bytes() == Path("halves.safetensors").read_bytes()
    monkeypatch.delitem(sys.modules, "shop", raising=False)
