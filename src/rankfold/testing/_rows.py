"""Does a class keep its word in the metric of the outputs, and where it says that it is two stages?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rankfold.layers import Metric, dense_type_of
from rankfold.testing._case import Case, refused, relative, require, same


def check_metric(layer: Any, case: Case) -> None:
    """Check that in a metric the outputs' error is what is promised, and the bias takes up what changes their mean.

    A class for a type without inputs to measure, such as `nn.Embedding`, refuses a metric, unless its two stages may
    serve a tied head.
    """
    dense, _ = case.twin()
    row = dense_type_of(dense)
    rank, full = case.chosen(layer), layer.full_rank(dense, **case.options)
    groups, n = getattr(dense, "groups", 1), dense.weight[0].numel()
    x = _inputs(groups, n)
    metric = Metric(x.mT @ x / x.shape[1], x.mean(1))
    if row is not None and row.rows == "none" and layer.stages is None:
        refused(lambda: layer.errors(dense, [rank], metric=metric, **case.options), ValueError, "errors in a metric")
        return
    exact = layer.from_dense(dense, rank=full, metric=metric, **case.options)
    same(exact.weight, dense.weight, "at full rank the weight is another one in a metric", within=1e-7)
    small = layer.from_dense(dense, rank=rank, metric=metric, **case.options)
    plain = layer.from_dense(dense, rank=rank, **case.options)
    before, after = _outputs(dense, dense.weight, dense, x), _outputs(dense, small.weight, small, x)
    if getattr(dense, "bias", None) is not None:
        same(after.mean(1), before.mean(1), "in a metric the bias is not b + (W - W') E[x]: the mean output changes")
        same(plain.bias, dense.bias, "without a metric the bias is another one")
    error = _error(dense, small.weight, x)
    (promised,) = layer.errors(dense, [rank], metric=metric, **case.options)
    close = abs(error - promised) <= 1e-4 * error + 1e-6 if case.exact_errors else promised >= 0.9 * error - 1e-6
    require(close, f"errors promises {promised:.6g} in the metric, and the outputs are off by {error:.6g}")
    other = _error(dense, plain.weight, x)
    require(error <= other * (1 + 1e-6) + 1e-7, f"the metric makes outputs worse: {error:.6g} instead of {other:.6g}")


def _inputs(groups: int, n: int) -> Tensor:
    """Return inputs (groups, 3 n, n) with correlations, unequal scales and a mean."""
    source = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, n, n, generator=source, dtype=torch.float64) / math.sqrt(n)
    scales = torch.logspace(0, -1.5, n, dtype=torch.float64)
    white = torch.randn(groups, 3 * n, n, generator=source, dtype=torch.float64) * scales
    return white @ (mixing + torch.eye(n, dtype=torch.float64)) + 0.3


def _outputs(dense: Any, weight: Tensor, owner: Any, x: Tensor) -> Tensor:
    """Return outputs (groups, count, out) of a weight for inputs (groups, count, n)."""
    y = x @ weight.detach().reshape(len(x), -1, x.shape[2]).mT
    return y if getattr(dense, "bias", None) is None else y + owner.bias.detach().reshape(len(x), 1, -1)


def _error(dense: Any, weight: Tensor, x: Tensor) -> float:
    """Return the relative error of the outputs of a weight, without their mean where a bias takes it up."""
    products = [x @ w.detach().reshape(len(x), -1, x.shape[2]).mT for w in (dense.weight, weight)]
    if getattr(dense, "bias", None) is not None:
        products = [y - y.mean(1, keepdim=True) for y in products]
    return float((products[0] - products[1]).norm() / products[0].norm())


def check_stages(layer: Any, case: Case) -> None:
    """Check what a class says of its `stages`: that they are `down` and `up`, and make any weight of the rank."""
    if layer.stages is None:
        return
    dense, x = case.twin()
    rank = case.chosen(layer)
    require(isinstance(rank, int), f"two stages have one rank between them, not {rank!r}")
    built = layer.from_dense(dense, rank=rank, **case.options)
    missing = [name for name in ("down", "up") if not isinstance(getattr(built, name, None), torch.nn.Module)]
    require(not missing, f"stages are submodules `down` and `up`, and it has no {' and no '.join(missing)}")
    if layer.stages.plain:
        kinds = [dense_type_of(stage) for stage in (built.down, built.up)]
        require(all(row is not None and row.stock for row in kinds), "plain stages are stock layers")
        same(built(x), built.up(built.down(x)), "it computes something else than up(down(input))")
        if layer.stages.is_matrix(case.options):
            same(_product(built), _matrices(built.weight, built), "up times down is not weight.flatten(1)")
    again = layer.from_dense(built.to_dense(), rank=rank, **case.options)
    error = relative(again.weight, built.weight)
    require(error < 1e-8, f"from_dense of a weight of rank {rank} is off by {error:.2g}: two stages reproduce it")


def _product(built: Any) -> Tensor:
    """Return the product of the two stages as matrices (groups, out, n)."""
    row = dense_type_of(built.down)
    if row is not None and row.rows == "none":  # a table (rows, rank) that is looked up, then mapped
        table: Tensor = built.down.weight @ built.up.weight.T
        return table[None]
    return _matrices(built.up.weight, built) @ _matrices(built.down.weight, built)


def _matrices(weight: Tensor, owner: Any) -> Tensor:
    """Return a weight as matrices (groups, out, n)."""
    groups: int = getattr(owner, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)
