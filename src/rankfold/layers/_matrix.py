"""What the layers with a matrix for a weight share: its ranks, its spectrum, its two factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.decompose import singular_values, svd
from rankfold.layers._build import check_type, copy_, finite_weight
from rankfold.layers._contract import Rank, Spectrum
from rankfold.layers._ranks import CANDIDATES, break_even, check_rank, spread, tail_errors


def matrix_ranks(dense: Any, multiple: int) -> tuple[int, ...]:
    """Return candidate ranks of a matrix whose two factors have fewer parameters than itself."""
    rows, columns = dense.weight.shape
    return spread(break_even(rows + columns, rows * columns), multiple, CANDIDATES)


def matrix_full_rank(dense: Any) -> int:
    """Return the smaller side of the weight."""
    rows, columns = dense.weight.shape
    return min(int(rows), int(columns))


def matrix_errors(owner: type[nn.Module], dense: nn.Module, ranks: Sequence[Rank]) -> tuple[float, ...]:
    """Return the relative error of truncating the weight at each rank."""
    (spectrum,) = matrix_spectrum(owner, dense)
    checked: list[Any] = [check_rank(owner.__name__, rank, min(spectrum.shape)) for rank in ranks]
    return tuple(tail_errors(spectrum.values, checked))


def matrix_spectrum(owner: Any, dense: nn.Module) -> tuple[Spectrum, ...]:
    """Return the singular values of the weight."""
    check_type(owner, dense, owner.dense_type)
    weight = finite_weight(owner, dense, torch.float32)  # made float64 inside, once: a table may be half the model
    rows, columns = weight.shape
    return (Spectrum(singular_values(weight), (rows, columns)),)


def decompose_into(layer: Any, dense: nn.Module, *, rows: Tensor, columns: Tensor, seed: int) -> None:
    """Write the truncated SVD of the weight into `rows` (out, rank) and `columns` (rank, in), balanced."""
    left, right = svd(finite_weight(type(layer), dense, torch.float32), layer.rank, seed=seed).balanced()
    copy_(rows, left)
    copy_(columns, right)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared Frobenius norm of `left @ right` from their rank x rank Gram matrices, batched or not."""
    return ((left.mT @ left) * (right @ right.mT)).sum()
