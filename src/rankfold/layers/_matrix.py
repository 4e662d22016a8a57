"""What layers share whose weight is a matrix: ranks, spectrum, two factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.decompose import singular_values, svd
from rankfold.layers._build import check_type, copy_, finite_weight
from rankfold.layers._contract import Metric, Options, Rank, Spectrum, Stages
from rankfold.layers._metric import group_metrics
from rankfold.layers._ranks import CANDIDATES, break_even, check_rank, spread, tail_errors
from rankfold.layers._twin import TwinLayer


class MatrixLayer(TwinLayer):
    """A layer whose weight is the product of two factors, `down` then `up`; the final classes say how it is applied."""

    method: ClassVar[str] = "svd"
    stages: ClassVar[Stages | None] = Stages()
    up: nn.Linear

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with."""
        return self.up.in_features

    @property
    def options(self) -> Options:
        """Empty: the rank is all there is to choose."""
        return {}

    @classmethod
    def full_rank(cls, dense: nn.Module) -> Rank:
        """Return the smaller side of the weight."""
        rows, columns = _sides(dense)
        return min(rows, columns)

    @classmethod
    def rank_grid(cls, dense: nn.Module, *, multiple: int = 1) -> tuple[Rank, ...]:
        """Return candidate ranks, ascending, all with fewer parameters than the dense layer."""
        rows, columns = _sides(dense)
        return spread(break_even(rows + columns, rows * columns), multiple, CANDIDATES)

    @classmethod
    def errors(
        cls,
        dense: nn.Module,
        ranks: Sequence[Rank],
        *,
        seed: int = 0,  # noqa: ARG003 - exact
        metric: Metric | None = None,
    ) -> tuple[float, ...]:
        """Return the exact relative error of the weight, or of the outputs in a metric, at each rank."""
        check_type(cls, dense, cls.dense_type)
        (group,) = group_metrics(cls, dense, metric)
        # converted to float64 inside, only once: a table may be half the model
        weight = finite_weight(cls, dense, torch.float32)
        checked: list[Any] = [check_rank(cls.__name__, rank, min(weight.shape)) for rank in ranks]
        if metric is not None and group is None:
            return (0.0,) * len(checked)  # its inputs never vary, or its outputs carry no weight
        values = singular_values(weight, **({} if group is None else group.arguments()))
        return tuple(tail_errors(values, checked))

    @classmethod
    def spectra(cls, dense: nn.Module) -> tuple[Spectrum, ...]:
        """Return the singular values of the weight."""
        check_type(cls, dense, cls.dense_type)
        # converted to float64 inside, only once: a table may be half the model
        weight = finite_weight(cls, dense, torch.float32)
        rows, columns = weight.shape
        return (Spectrum(singular_values(weight), (rows, columns)),)


def _sides(dense: Any) -> tuple[int, int]:
    rows, columns = dense.weight.shape
    return int(rows), int(columns)


def decompose_into(
    layer: Any, dense: nn.Module, *, rows: Tensor, columns: Tensor, seed: int, metric: Metric | None = None
) -> None:
    """Write the truncated SVD of the weight into `rows` (out, rank) and `columns` (rank, in), balanced."""
    (group,) = group_metrics(type(layer), dense, metric)
    weighted = {} if group is None else group.arguments()
    left, right = svd(finite_weight(type(layer), dense, torch.float32), layer.rank, seed=seed, **weighted).balanced()
    copy_(rows, left)
    copy_(columns, right)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared Frobenius norm of `left @ right` from their rank x rank Gram matrices, batched or not."""
    return ((left.mT @ left) * (right @ right.mT)).sum()
