"""The cores of a tensor train: made orthogonal, multiplied with a tensor, given back the paired modes of a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.decompose._factors import TT, TTMatrix


def orthogonalise_from_right(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the same train with orthonormal rows in every core but the first, bonds cut to what is possible."""
    done: list[Tensor] = []
    carry = cores[-1]
    for core in reversed(cores[:-1]):
        q, r = torch.linalg.qr(carry.flatten(1).T)
        done.insert(0, q.T.reshape(-1, *carry.shape[1:]))
        carry = core @ r.T
    return [carry, *done]


def inner(tensor: Tensor, cores: Sequence[Tensor]) -> float:
    """Return the inner product of a tensor with a train, contracted from the left."""
    rest = tensor.reshape(1, -1)
    for core in cores:
        rows = core.flatten(0, 1)
        rest = rows.T @ rest.reshape(rows.shape[0], -1)
    return float(rest)


def unpaired(train: TT, out_shape: Sequence[int], in_shape: Sequence[int]) -> TTMatrix:
    """Return the train of a matrix from that over its merged modes: cores (r, out * in, r') as (r, out, in, r')."""
    dims = zip(train.cores, out_shape, in_shape, strict=True)
    cores = tuple(core.reshape(core.shape[0], out, into, core.shape[2]) for core, out, into in dims)
    return TTMatrix(cores, train.error, train.bound)
