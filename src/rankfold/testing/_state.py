"""Is a layer copied, stored, seeded and placed as its dense twin is?"""

from __future__ import annotations

import copy
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.layers import registered
from rankfold.planning import Choice, Plan
from rankfold.store import load, save
from rankfold.surgery import apply, densify
from rankfold.testing._case import Case, identical, require, same, state

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_mode(layer: Any, case: Case) -> None:
    """Check that dtype, train or eval mode and requires_grad of the dense layer are kept, there and back."""
    rank = case.chosen(layer)
    for dtype in DTYPES:
        dense, x = case.twin(dtype)
        for what, twin in _twins(layer, dense, rank, case).items():
            found = {p.dtype for p in twin.parameters()}
            require(found == {dtype}, f"parameters of {what} are in {found}, and the dense layer is in {dtype}")
            require(twin(x).dtype == dense(x).dtype, f"the output of {what} is {twin(x).dtype} for a layer in {dtype}")
    for training, (weight, bias) in product((True, False), ((True, False), (False, True))):
        dense, _ = case.twin()
        dense.train(training).weight.requires_grad_(weight)
        if getattr(dense, "bias", None) is not None:
            dense.bias.requires_grad_(bias)
        for what, twin in _twins(layer, dense, rank, case).items():
            modes = {module.training for module in twin.modules()}
            require(modes == {training}, f"{what} is not in the mode of the dense layer, training={training}")
            for name, parameter in twin.named_parameters():
                wanted = bias if name.rpartition(".")[2] == "bias" else weight
                require(parameter.requires_grad is wanted, f"requires_grad of {name} of {what} is not {wanted}")


def _twins(layer: Any, dense: Any, rank: Any, case: Case) -> dict[str, nn.Module]:
    built = layer.from_dense(dense, rank=rank, **case.options)
    fresh = layer.like(dense, rank=rank, **case.options)
    return {"from_dense": built, "like": fresh, "to_dense": built.to_dense()}


def check_meta(layer: Any, case: Case) -> None:
    """Check that `like` allocates nothing on the meta device, from a dense layer there or with `device="meta"`."""
    dense, _ = case.twin()
    rank, empty = case.chosen(layer), copy.deepcopy(case.dense).to("meta")
    for source in (dense, empty):
        built = layer.like(source, rank=rank, device="meta", **case.options)
        placed = [name for name, value in built.state_dict().items() if not value.is_meta]
        require(not placed, f"like(device='meta') gives {', '.join(placed)} memory")
    require(built.weight.shape == dense.weight.shape, f"the weight on the meta device is {tuple(built.weight.shape)}")
    there = layer.like(empty, rank=rank, **case.options)
    require(next(there.parameters()).is_meta, "like of a dense layer on the meta device is not there")
    here = layer.like(empty, rank=rank, device="cpu", **case.options)
    require({p.device.type for p in here.parameters()} == {"cpu"}, "like(device='cpu') leaves parameters elsewhere")


def check_copies(layer: Any, case: Case) -> None:
    """Check that copies and states hold all of the layer, and that layer and dense layer share no memory."""
    dense, x = case.twin()
    rank = case.chosen(layer)
    built = layer.from_dense(dense, rank=rank, **case.options)
    fresh = layer.like(dense, rank=rank, seed=3, **case.options)
    fresh.load_state_dict(built.state_dict())
    for what, twin in {"a deep copy": copy.deepcopy(built), "a layer with the same state": fresh}.items():
        identical(twin(x), built(x), f"{what} computes something else")
    back = built.to_dense()
    before = state(dense), state(built)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.fill_(7.0)
        identical(state(built), before[1], "to_dense() shares memory with the layer")
        for parameter in built.parameters():
            parameter.fill_(7.0)
    identical(state(dense), before[0], "the layer shares memory with the dense layer")


def check_seeds(layer: Any, case: Case) -> None:
    """Check that a seed decides all that is random, and that torch's own generator is left alone."""
    dense, _ = case.twin()
    rank, before = case.chosen(layer), torch.get_rng_state()
    one, same_seed, other = (state(layer.like(dense, rank=rank, seed=seed, **case.options)) for seed in (1, 1, 2))
    identical(one, same_seed, "like with the same seed has other values")
    require(any(not torch.equal(one[name], other[name]) for name in one), "like has the same values for every seed")
    factors = [state(layer.from_dense(dense, rank=rank, seed=1, **case.options)) for _ in range(2)]
    identical(factors[0], factors[1], "from_dense with the same seed has other values")
    errors = [layer.errors(dense, [rank], seed=1, **case.options) for _ in range(2)]
    require(errors[0] == errors[1], "errors with the same seed are others")
    identical(torch.get_rng_state(), before, "torch's own generator has moved")


def check_saving(layer: Any, case: Case) -> None:
    """Check that a model with the layer is planned, built, saved and loaded, bit by bit, and made dense again."""
    dense, x = case.twin()
    model = nn.Sequential(dense)
    with registered(layer), tempfile.TemporaryDirectory() as folder:
        plan = Plan({"0": Choice(layer.method, case.chosen(layer), dict(case.options))})
        require(Plan.from_json(plan.to_json()) == plan, "the plan is another one after a round through JSON")
        small, path = apply(model, plan), Path(folder) / "small.safetensors"
        require(type(small[0]) is layer, f"apply builds a {type(small[0]).__name__}")  # type: ignore[index]
        save(small, plan, path)
        loaded = load(path, nn.Sequential(copy.deepcopy(dense)))
        identical(state(loaded), state(small), "what was loaded has other values than what was saved")
        identical(loaded(x), small(x), "what was loaded computes something else than what was saved")
        same(densify(small)(x), small(x), "the densified model computes something else")
