"""Where CP iterations begin: compressed cores, algebraic, nested-SVD and random starts, terms from a residual."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._cp_als import Terms, eigen, norms_and_directions, row_products
from rankfold.decompose._unfold import mode_gram, mode_product, unfold

Basis = Float[Tensor, "dim kept"]


def compress(tensor: Tensor, rank: int) -> tuple[Tensor, list[Tensor | None]]:
    """Return (core, bases) of a sequentially truncated HOSVD that no mode leaves larger than the rank.

    A mode longer than the product of the others loses nothing; one longer than the rank loses what a
    rank-`rank` fit in that mode's leading subspace cannot reach.
    """
    bases: list[Tensor | None] = [None] * tensor.ndim
    for mode in sorted(range(tensor.ndim), key=lambda k: -tensor.shape[k]):
        size = min(rank, tensor.numel() // tensor.shape[mode])
        if size < tensor.shape[mode]:
            basis = leading_basis(tensor, mode, size)
            bases[mode], tensor = basis, mode_product(tensor, basis.T.contiguous(), mode)
    return tensor, bases


def leading_basis(tensor: Tensor, mode: int, size: int) -> Basis:
    """Return the leading left singular vectors of an unfolding, from the Gram matrix of its shorter side."""
    rest = tensor.numel() // tensor.shape[mode]
    if tensor.shape[mode] <= rest:
        return eigen(mode_gram(tensor, mode))[1][:, -size:].flip(1)
    rows = unfold(tensor, mode)
    right = eigen(rows.T @ rows)[1][:, -size:].flip(1)
    basis: Tensor = torch.linalg.qr(rows @ right)[0]
    return basis


def expand(terms: Terms, bases: Sequence[Tensor | None]) -> Terms:
    """Return the terms of a core as terms of the tensor it was compressed from."""
    rows = [r if basis is None else r @ basis.T for r, basis in zip(terms.rows, bases, strict=True)]
    return Terms(terms.weights, rows)


def nested(tensor: Tensor, rank: int, seed: int = 0) -> Terms:
    """Return the strongest terms of the orthogonal rank-one expansion by nested SVDs.

    The tensor is split along one mode into its principal slices, each of these along the next, until fibres of the
    longest mode are left: mutually orthogonal rank-one terms, at most the product of all dims but the
    longest, which together are the tensor. (Batselier, Liu and Wong 2015, "TTr1SVD".)
    """
    del seed  # nothing is random here, but all starts have one signature
    modes = sorted(range(tensor.ndim), key=lambda k: -tensor.shape[k])
    modes = [*modes[1:], modes[0]]
    slices = tensor.permute(modes).unsqueeze(0)  # (terms, dims of the modes still to be split)
    rows: list[Tensor] = []
    for _ in modes[:-1]:
        parts = slices.flatten(2)
        vectors = eigen(parts @ parts.mT)[1].mT.contiguous()  # (terms, found, dim)
        parts = (vectors @ parts).flatten(0, 1)
        best = torch.linalg.vector_norm(parts, dim=1).sort(descending=True, stable=True).indices[:rank]
        parents = best.div(vectors.shape[1], rounding_mode="floor")
        rows = [*(r[parents] for r in rows), vectors.flatten(0, 1)[best]]
        slices = parts[best].reshape(len(best), *slices.shape[2:])
    return _gather([*rows, slices], modes, rank)


def _gather(rows: Sequence[Tensor], modes: Sequence[int], rank: int) -> Terms:
    """Return terms from unit rows given in the order of `modes`, the last of which carry the scale."""
    weights, last = norms_and_directions(rows[-1])
    of = dict(zip(modes, [*rows[:-1], last], strict=True))
    return pad(Terms(weights, [of[k] for k in range(len(modes))]), rank)


def pad(terms: Terms, rank: int) -> Terms:
    """Return the terms followed by zero terms up to the rank."""
    missing = rank - len(terms.weights)
    if missing == 0:
        return terms
    rows = [torch.cat([r, r.new_zeros(missing, r.shape[1])]) for r in terms.rows]
    return Terms(torch.cat([terms.weights, terms.weights.new_zeros(missing)]), rows)


def extend(tensor: Tensor, terms: Terms, rank: int) -> Terms:
    """Return the terms followed by the strongest nested-SVD terms of their residual, up to the rank."""
    missing = rank - len(terms.weights)
    if missing == 0:
        return terms
    more = nested(tensor - dense(terms), missing)
    joined = zip(terms.rows, more.rows, strict=True)
    return Terms(torch.cat([terms.weights, more.weights]), [torch.cat(pair) for pair in joined])


def dense(terms: Terms) -> Tensor:
    """Return the sum of the terms."""
    left = terms.rows[0] * terms.weights[:, None]
    return (left.T @ row_products(terms.rows[1:])).reshape([r.shape[1] for r in terms.rows])


def random(tensor: Tensor, rank: int, seed: int) -> Terms:
    """Return Gaussian directions, each term with an equal share of the tensor's norm."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(rank, dim, generator=generator, dtype=torch.float64) for dim in tensor.shape]
    rows = [norms_and_directions(draw)[1].to(tensor) for draw in draws]
    weight = float(torch.linalg.vector_norm(tensor)) / math.sqrt(rank)
    return Terms(tensor.new_full((rank,), weight), rows)


def algebraic(tensor: Tensor, rank: int, seed: int) -> Terms | None:
    """Return the terms that a pencil of two mixtures of slices diagonalises: exact where the tensor has that rank.

    Compressed to (r, r, K), a tensor `sum a b c` has slices `A diag(.) B^T`; the eigenvectors of
    `S_1 S_2^-1` for two random mixtures of slices are A (Leurgans, Ross and Abel 1993), and A^-1 times the tensor
    is a stack of rank-one pieces. Conjugate pairs, which noise brings, give their real and imaginary parts.

    Returns:
        The terms, padded with zeros where two unfoldings show a lower rank; None where the two longest modes are
        shorter than the rank, or the pencil is singular.
    """
    first, second = sorted(range(tensor.ndim), key=lambda k: -tensor.shape[k])[:2]
    bases = [_numerical_basis(tensor, mode, rank) for mode in (first, second)]
    size = min(basis.shape[1] for basis in bases)
    if size < rank and size == tensor.shape[second]:
        return None
    others = [k for k in range(tensor.ndim) if k not in (first, second)]
    core = tensor.permute(first, second, *others)
    shape = core.shape
    for mode, basis in enumerate(bases):
        core = mode_product(core, basis[:, :size].T.contiguous(), mode)
    columns = _pencil_vectors(core.flatten(2), seed)
    pieces, singular = torch.linalg.solve_ex(columns, core.flatten(1))
    if singular or not torch.isfinite(pieces).all():
        return None
    rows = [columns.T, *_leading_rows(pieces.reshape(size, size, *shape[2:]))]
    for k, basis in enumerate(bases):
        rows[k] = rows[k] @ basis[:, :size].T
    return _gather(rows, [first, second, *others], rank)


def _numerical_basis(tensor: Tensor, mode: int, rank: int) -> Basis:
    """Return at most `rank` leading left singular vectors, those above the rounding of a Gram matrix."""
    values, vectors = eigen(mode_gram(tensor, mode))
    above = int((values > values[-1] * len(values) * 8 * torch.finfo(values.dtype).eps).sum())
    return vectors.flip(1)[:, : min(rank, above)]


def _pencil_vectors(slabs: Float[Tensor, "r r depth"], seed: int) -> Float[Tensor, "r r"]:
    """Return unit columns: eigenvectors of `S_1 S_2^-1` for two random mixtures of the slabs."""
    generator = torch.Generator().manual_seed(seed)
    mixtures = torch.randn(slabs.shape[2], 2, generator=generator, dtype=torch.float64).to(slabs)
    pencil = (slabs @ mixtures).movedim(2, 0)
    quotient, _ = torch.linalg.solve_ex(pencil[1].T.contiguous(), pencil[0].T.contiguous())
    if not torch.isfinite(quotient).all():
        return torch.full_like(quotient, math.nan)
    values, vectors = torch.linalg.eig(quotient.T)
    columns = torch.where(values.imag < 0, vectors.imag, vectors.real)
    return norms_and_directions(columns.T)[1].T


def _leading_rows(pieces: Tensor) -> list[Tensor]:
    """Return the rows of the best rank-one fit to each piece, mode after mode; the last ones carry the scale."""
    rows = []
    while pieces.ndim > 2:
        parts = pieces.flatten(2)
        if parts.shape[1] <= parts.shape[2]:
            left = eigen(parts @ parts.mT)[1][:, :, -1]
        else:
            right = eigen(parts.mT @ parts)[1][:, :, -1:]
            left = norms_and_directions((parts @ right)[:, :, 0])[1]
        rows.append(left)
        pieces = (left[:, None, :] @ parts).reshape(len(pieces), *pieces.shape[2:])
    return [*rows, pieces]


Start = Callable[[Tensor, int, int], Terms | None]
STARTS: dict[str, Start] = {"algebraic": algebraic, "hosvd": nested, "random": random}
