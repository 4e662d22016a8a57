"""Does compressing a model take little more memory than the model?"""

import subprocess
import sys

import pytest
import torch
from cases_models import CalledTwice, mlp, params
from torch import nn

import rankfold as rf

PROGRAM = """
import resource, torch, rankfold as rf

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

make, example = {make}, {example}
make(0), rf.compress(torch.nn.Linear(9, 9), example=torch.ones(1, 9), budget=rf.Budget(params=1.0))  # all imports
base = peak()
model = make(1)
size = sum(p.numel() * p.element_size() for p in model.parameters())
rf.compress(model, example=example, budget=rf.Budget(params=0.5))
print((peak() - base) / size)
"""
STACK = "lambda on: torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(24 * on)))"
TABLE = "lambda on: torch.nn.Embedding(20_000 * on + 9, 256)"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "example"), [(STACK, "torch.ones(1, 1024)"), (TABLE, "torch.zeros(1, 4).long()")])
def test_the_peak_is_within_bounds(make, example):
    """The model itself counts; a table that is the whole model is the worst case, with float64 copies of all of it."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(make=make, example=example)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < (3 if make is STACK else 6)


@pytest.mark.parametrize("init", ["decompose", "random"])
def test_weights_that_are_replaced_are_not_copied(init, monkeypatch):
    model = nn.Sequential(CalledTwice(), mlp(32, 32, 32))
    plan = rf.Plan({"0.body": rf.Choice("svd", rank=4), "1.1": rf.Choice("svd", rank=4)})
    copied = []
    original = nn.Parameter.__deepcopy__

    def noted(parameter, memo):
        copied.append(parameter)
        return original(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", noted)
    rf.apply(model, plan, init=init)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in copied} == {"0.head.weight", "0.head.bias", "1.0.weight", "1.0.bias"}


def test_loading_allocates_the_small_model_alone(tmp_path, monkeypatch):
    plan = rf.Plan({"0": rf.Choice("svd", rank=4)})
    small = rf.apply(mlp(64, 64), plan)
    rf.save(small, plan, tmp_path / "small.safetensors")
    with torch.device("meta"):
        skeleton = mlp(64, 64)
    made = []
    empty = torch.empty

    def noted(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "empty", noted)
    loaded = rf.load(tmp_path / "small.safetensors", skeleton)
    assert sum(tensor.numel() for tensor in made if not tensor.is_meta) == 0
    assert params(loaded) == params(small)
