"""Does a class know, without building a layer, what it takes, what it would cost and how far off it would be?"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.layers import Call, FactorisedLayer, dense_cost
from rankfold.testing._case import Case, beyond, refused, relative, require

MULTIPLES = (1, 4)
DRAWS = 16
SCATTER = 0.5  # share of the expected norm by which the mean over the draws may miss it


def check_contract(layer: Any, case: Case) -> None:
    """Check members, what is kept of the dense layer, `rank` and `options`, and that what does not fit is refused."""
    dense, _ = case.twin()
    full = layer.full_rank(dense, **case.options)
    built = layer.from_dense(dense, rank=full, **case.options)
    require(isinstance(built, FactorisedLayer), "it lacks something of rankfold.layers.FactorisedLayer")
    require(built.rank == full, f"its rank is {built.rank!r}, where {full!r} was given")
    told = {name: built.options.get(name) for name in case.options}
    require(told == dict(case.options), f"its options are {dict(built.options)}, where {case.options} were given")
    _check_kept(built, dense)
    again = layer.like(dense, rank=built.rank, **built.options)
    shapes = [{name: value.shape for name, value in twin.state_dict().items()} for twin in (built, again)]
    require(shapes[0] == shapes[1], "like(rank=layer.rank, **layer.options) has another state than the layer")
    _check_refusals(layer, dense, full, case)


def _check_kept(built: Any, dense: Any) -> None:
    """Check that the layer and its dense twin have the attributes of the dense layer."""
    for name in type(dense).__constants__:
        for what, twin in (("the layer", built), ("to_dense()", built.to_dense())):
            value = getattr(twin, name, "missing")
            require(value == getattr(dense, name), f"{name} of {what} is {value!r}, not {getattr(dense, name)!r}")
    if not hasattr(dense, "bias"):
        return
    for what, twin in (("the layer", built), ("to_dense()", built.to_dense())):
        require((twin.bias is None) == (dense.bias is None), f"{what} has a bias where the dense layer has none")
        if dense.bias is not None:
            require(torch.equal(twin.bias, dense.bias), f"{what} has another bias than the dense layer")


def _check_refusals(layer: Any, dense: Any, full: Any, case: Case) -> None:
    options = dict(case.options)
    unknown = {"rank": full, **options, "no_such_option": 1}
    refused(partial(layer.from_dense, dense, **unknown), TypeError, "from_dense with an option that is none")
    refused(partial(layer.cost, dense, [], **unknown), TypeError, "cost with an option that is none")
    zero = tuple(0 for _ in full) if isinstance(full, tuple) else 0
    for rank in (zero, beyond(full)):
        calls = {
            "from_dense": partial(layer.from_dense, dense, rank=rank, **options),
            "like": partial(layer.like, dense, rank=rank, **options),
            "cost": partial(layer.cost, dense, [], rank=rank, **options),
            "errors": partial(layer.errors, dense, [rank], **options),
        }
        for name, call in calls.items():
            refused(call, ValueError, f"{name} at rank {rank!r}, where the full rank is {full!r}")
    for name in ("from_dense", "like"):
        call = partial(getattr(layer, name), nn.BatchNorm1d(3), rank=full, **options)
        refused(call, ValueError, f"{name} of a BatchNorm1d")


def check_rank_grid(layer: Any, case: Case) -> None:
    """Check that every rank of the grid has fewer parameters than dense, in ascending order, from shapes alone."""
    dense, _ = case.twin()
    most, full = dense_cost(dense, []).params, layer.full_rank(dense, **case.options)
    for multiple in MULTIPLES:
        grid = layer.rank_grid(dense, multiple=multiple, **case.options)
        sizes = [layer.cost(dense, [], rank=rank, **case.options).params for rank in grid]
        require(len(set(grid)) == len(grid), "rank_grid names a rank twice")
        require(sizes == sorted(sizes), "rank_grid does not ascend in parameters")
        largest = max(sizes, default=0)
        require(largest < most, f"rank_grid has a rank of {largest} parameters, and the dense layer has {most}")
        for rank in grid:
            pairs = zip(rank, full, strict=True) if isinstance(rank, tuple) else [(rank, full)]
            fits = all(1 <= r <= limit and (r % multiple == 0 or r == limit) for r, limit in pairs)
            require(fits, f"rank {rank!r} of rank_grid(multiple={multiple}) is not a multiple up to the full {full!r}")
    for options in layer.variants(dense):
        require(bool(layer.rank_grid(dense, **options)), f"variants names {dict(options)}, of which no rank pays")
    grid, empty = layer.rank_grid(dense, **case.options), copy.deepcopy(dense).to("meta")
    require(layer.rank_grid(empty, **case.options) == grid, "rank_grid is another one on the meta device")
    require(layer.full_rank(empty, **case.options) == full, "full_rank is another one on the meta device")
    require(layer.variants(empty) == layer.variants(case.dense), "variants are others on the meta device")


def check_costs(layer: Any, case: Case) -> None:
    """Check that `cost` counts the parameters of the layer, and that its state holds nothing else."""
    dense, _ = case.twin()
    rank = case.chosen(layer)
    cost, built = layer.cost(dense, [], rank=rank, **case.options), layer.like(dense, rank=rank, **case.options)
    params = sum(p.numel() for p in built.parameters())
    require(cost.params == params, f"cost says {cost.params} parameters, and the layer has {params}")
    require(cost.macs == 0, f"cost says {cost.macs} multiply-adds for no calls")
    held = sum(value.numel() for value in built.state_dict().values())
    require(held == params, f"its state holds {held - params} numbers that are no parameters: no budget counts them")


def check_macs(layer: Any, case: Case) -> None:
    """Check that `cost` counts the multiply-adds that torch counts while the layer runs."""
    dense, x = case.twin()
    rank = case.chosen(layer)
    built = layer.like(dense, rank=rank, **case.options)
    calls, counted = [], 0
    for inputs in (x, torch.cat([x, x])):
        call, macs = _counted(built, inputs)
        calls.append(call)
        counted += macs
    told = layer.cost(dense, calls, rank=rank, **case.options).macs
    require(told == counted, f"cost says {told} multiply-adds for {calls}, and torch counts {counted}")


def _counted(module: nn.Module, x: Tensor) -> tuple[Call, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = module(x)
    return Call(tuple(x.shape), tuple(output.shape)), counter.get_total_flops() // 2


def check_errors(layer: Any, case: Case) -> None:
    """Check that `errors` promises what `from_dense` reaches, 0 at full rank, and that spectra are spectra."""
    dense, _ = case.twin()
    rank, full = case.chosen(layer), layer.full_rank(dense, **case.options)
    promised = layer.errors(dense, [rank, full], **case.options)
    require(len(promised) == 2, f"errors promises {len(promised)} values for 2 ranks")
    require(promised[1] < 1e-6, f"errors promises {promised[1]:.2g} at full rank, where the layer is exact")
    error = relative(layer.from_dense(dense, rank=rank, **case.options).weight, dense.weight)
    if case.exact_errors:
        close = abs(error - promised[0]) <= 1e-5 * error + 1e-7
    else:
        close = error <= 1.02 * promised[0] + 1e-6
    require(close, f"errors promises {promised[0]:.6g} at rank {rank!r}, and the weight is off by {error:.6g}")
    spectra, sizes = layer.spectra(dense, **case.options), full if isinstance(full, tuple) else (full,)
    require(len(spectra) in (0, len(sizes)), f"spectra returns {len(spectra)}, and a rank has {len(sizes)} entries")
    for spectrum in spectra:
        falls = spectrum.values.dtype == torch.float64 and bool((spectrum.values.diff() <= 0).all())
        require(falls, "the values of a spectrum are not descending in float64")


def check_initialisation(layer: Any, case: Case) -> None:
    """Check that `like` draws weights of the size that gives a fresh dense layer's output variance.

    White input gives the output variance `||weight||^2 / out`: 1/3 in a fresh `nn.Linear` or convolution, and 1 in
    the entries of a fresh `nn.Embedding`.
    """
    dense, _ = case.twin()
    rank, expected = case.chosen(layer), dense.weight.shape[0] / 3
    if isinstance(dense, nn.Embedding):
        expected = (dense.num_embeddings - (dense.padding_idx is not None)) * dense.embedding_dim
    norms = [layer.like(dense, rank=rank, seed=seed, **case.options).squared_norm() for seed in range(DRAWS)]
    mean = float(torch.stack(norms).detach().mean())
    close = abs(mean - expected) <= SCATTER * expected
    require(close, f"fresh weights have a squared norm of {mean:.3g}, where a fresh dense layer's is {expected:.3g}")
