"""What all tensor-train layers share: checked sizes, bonds, cores, the dense matrix and its norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import is_whole, whole
from rankfold.decompose import balanced_shape, bonds, pair_modes, tensor_train, tt_roundings
from rankfold.errors import DecompositionError, LayerError
from rankfold.layers._build import copy_
from rankfold.layers._contract import Options, Rank
from rankfold.layers._ranks import below, check_rank
from rankfold.layers.tensor._tt_contract import merge
from rankfold.layers.tensor._tt_order import Chain

ORDERS = (2, 3, 4)
"""Numbers of cores worth planning."""

TYPICAL_MODE = 8
"""The mode size that the default number of cores aims for, as in Novikov et al. (2015)."""

PADDING = 1.25
"""How much larger than the matrix a padded shape may be to be worth planning."""

RESOLVED = 1e-6
"""Errors below this drown in the rounding of a difference of squared norms."""


@dataclass(frozen=True)
class TTForm:
    """The form of a tensor train: a matrix `out_size x in_size` over padded modes, after a mode of `lead` if not 0.

    For a convolution the lead is the positions in the kernel: a core of their own, before those of the channels.
    A redundant train may have any bonds, even beyond what its modes can use.
    """

    owner: str
    out_size: int
    in_size: int
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    lead: int = 0
    redundant: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options that give this form; `redundant` only if it is."""
        shapes: dict[str, Any] = {"in_shape": self.in_shape, "out_shape": self.out_shape}
        return {**shapes, "redundant": True} if self.redundant else shapes

    @property
    def modes(self) -> tuple[int, ...]:
        """The dims of the folded tensor: the lead, then one merged pair per core."""
        pairs = tuple(m * n for m, n in zip(self.out_shape, self.in_shape, strict=True))
        return (self.lead, *pairs) if self.lead else pairs

    def full_bonds(self) -> tuple[int, ...]:
        """Return the largest rank possible at each bond."""
        return bonds(self.modes, None)

    def full_rank(self) -> int:
        """Return the cap that cuts nothing."""
        return max(self.full_bonds(), default=1)

    def chain(self, rank: Rank) -> Chain:
        """Return the sizes of all cores at a rank, or raise a `LayerError`."""
        inner = self._any_bonds(rank) if self.redundant else self._bonds(rank)
        head = ((self.lead,), (1,)) if self.lead else ((), ())
        return Chain((*head[0], *self.out_shape), (*head[1], *self.in_shape), (1, *inner, 1))

    def _bonds(self, rank: Rank) -> tuple[int, ...]:
        full = self.full_bonds()
        checked = check_rank(self.owner, rank, full if isinstance(rank, (tuple, list)) else self.full_rank())
        try:
            return bonds(self.modes, checked)
        except DecompositionError as error:
            raise LayerError(f"{self.owner}: {error}") from error

    def _any_bonds(self, rank: Any) -> tuple[int, ...]:
        count = len(self.modes) - 1
        inner = tuple(rank) if isinstance(rank, (tuple, list)) else (rank,) * count
        if len(inner) != count or not all(map(is_whole, inner)):
            raise LayerError(f"{self.owner}: rank={rank!r} is neither an int >= 1 nor a tuple of {count} of them")
        return tuple(map(int, inner))

    def params(self, rank: Rank) -> int:
        """Return the entries of all cores at a rank."""
        chain = self.chain(rank)
        return sum(chain.core(k, k + 1) for k in range(len(chain.out_shape)))

    def rank_grid(self, multiple: int, dense: int) -> tuple[Rank, ...]:
        """Return caps (powers of two and halfway between, rounded to `multiple`) with fewer parameters than `dense`."""
        whole(f"{self.owner}: multiple", multiple, error=LayerError, why="; 1 allows every rank")
        full = self.full_rank()
        powers = [2**k for k in range(full.bit_length())]
        steps = {-(-step // multiple) * multiple for power in powers for step in (power, power * 3 // 2)}
        return below(dense, [cap for cap in steps if cap <= full], self.params)

    def fold(self, matrix: Tensor) -> Tensor:
        """Return a matrix `(lead, out, in)`, or `(out, in)` without a lead, padded and folded to one mode per core."""
        if not self.lead:
            return pair_modes(matrix, self.out_shape, self.in_shape)
        return torch.stack([pair_modes(part, self.out_shape, self.in_shape) for part in matrix])


def make_form(
    owner: str,
    sizes: tuple[int, int],
    in_shape: Sequence[int] | None,
    out_shape: Sequence[int] | None,
    *,
    lead: int = 0,
    redundant: bool = False,
) -> TTForm:
    """Return the form for a matrix of `sizes = (out, in)`; shapes not given are balanced, and padded where needed."""
    given = out_shape if in_shape is None else in_shape
    order = _default_order(sizes) if given is None else len(given)
    shapes = [
        balanced_shape(size, order) if shape is None else _checked_shape(owner, name, shape, size)
        for name, shape, size in (("out_shape", out_shape, sizes[0]), ("in_shape", in_shape, sizes[1]))
    ]
    if len(shapes[0]) != len(shapes[1]):
        raise LayerError(
            f"{owner}: out_shape={shapes[0]} and in_shape={shapes[1]} need as many dims; one core has one of each"
        )
    if len(shapes[0]) < 2 and not lead:
        raise LayerError(f"{owner}: a train needs two cores or more; out_shape={shapes[0]} makes one")
    if not isinstance(redundant, bool):
        raise LayerError(f"{owner}: redundant={redundant!r} is neither True nor False")
    return TTForm(owner, sizes[0], sizes[1], shapes[0], shapes[1], lead, redundant)


def _default_order(sizes: tuple[int, int]) -> int:
    return min(max(round(math.log(max(sizes), TYPICAL_MODE)), 2), 4)


def _checked_shape(owner: str, name: str, shape: object, size: int) -> tuple[int, ...]:
    dims = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if not dims or not all(map(is_whole, dims)):
        raise LayerError(f"{owner}: {name}={shape!r} is not a tuple of positive ints")
    if math.prod(dims) < size:
        raise LayerError(f"{owner}: {name}={dims} has the product {math.prod(dims)}, which does not cover {size}")
    return tuple(map(int, dims))


def balanced_options(sizes: tuple[int, int]) -> Iterator[Options]:
    """Yield the balanced shapes of 2, 3 and 4 cores that need little padding and have no modes of size 1."""
    for order in ORDERS:
        out_shape, in_shape = (balanced_shape(size, order) for size in sizes)
        padded = math.prod(out_shape) * math.prod(in_shape)
        if min(*out_shape, *in_shape) > 1 and padded <= PADDING * math.prod(sizes):
            yield {"in_shape": in_shape, "out_shape": out_shape}


def empty_cores(chain: Chain, device: torch.device | str | int | None, dtype: torch.dtype | None) -> nn.ParameterList:
    """Return empty cores."""
    return nn.ParameterList(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in chain.shapes)


def fresh_cores_(cores: Sequence[Tensor], generator: torch.Generator | None) -> None:
    """Draw cores whose product has entries of variance 1, on the CPU: a seed gives the same values on every device."""
    for core in cores:
        if not core.is_meta:
            bound = math.sqrt(3 / core.shape[3])  # every entry of a partial product has variance 1
            copy_(core, torch.empty(core.shape, device="cpu").uniform_(-bound, bound, generator=generator))


def check_fillable(form: TTForm, rank: Rank) -> None:
    """Raise a `LayerError` if a redundant train has bonds that no decomposition of a weight can fill."""
    if not form.redundant:
        return
    inner = form.chain(rank).ranks[1:-1]
    try:
        bonds(form.modes, inner)
    except DecompositionError as error:
        raise LayerError(
            f"{form.owner}: {error}; the parameters beyond that would start, and stay, at zero. Redundant bonds are "
            "for fresh layers: use the constructor or `like` (`init='random'`), or smaller bonds"
        ) from error


def decomposed(form: TTForm, matrix: Tensor, rank: Rank) -> Sequence[Tensor]:
    """Return the cores of the TT-SVD of a weight."""
    return tensor_train(form.fold(matrix), form.chain(rank).ranks[1:-1], dtype=torch.float64).cores


def fill_cores_(cores: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Fill cores with those of a decomposition, spreading its scale evenly over them."""
    norms = [float(torch.linalg.vector_norm(core)) for core in values]
    mean = math.prod(norm ** (1 / len(norms)) for norm in norms)
    for core, value, norm in zip(cores, values, norms, strict=True):
        copy_(core, (value * (mean / norm if norm else 1.0)).reshape(core.shape))


def errors(form: TTForm, matrix: Tensor, ranks: Sequence[Rank]) -> tuple[float, ...]:
    """Return the error at each rank, measured on one TT-SVD rounded to each; errors on padding do not count."""
    folded = form.fold(matrix)
    total = float(torch.linalg.vector_norm(folded)) ** 2
    whole = replace(form, out_size=math.prod(form.out_shape), in_size=math.prod(form.in_shape))
    found = []
    for rounded in tt_roundings(folded, [form.chain(rank).ranks[1:-1] for rank in ranks]):
        chain = form.chain(rounded.rank)
        cores = [core.reshape(shape) for core, shape in zip(rounded.cores, chain.shapes, strict=True)]
        padded = form != whole and rounded.error > RESOLVED
        outside = float(squared_norm(cores, whole) - squared_norm(cores, form)) if padded else 0.0
        found.append(math.sqrt(max(rounded.error**2 - outside / max(total, 1e-300), 0.0)))
    return tuple(found)


def dense_matrix(cores: Sequence[Tensor], form: TTForm, order: Sequence[int]) -> Tensor:
    """Return the matrix, `(lead, out, in)` if there is a lead, cut to its size (differentiable)."""
    whole = merge(cores, order)[0, :, :, 0]
    if not form.lead:
        return whole[: form.out_size, : form.in_size]
    return whole.reshape(form.lead, -1, whole.shape[1])[:, : form.out_size, : form.in_size]


def squared_norm(cores: Sequence[Tensor], form: TTForm) -> Tensor:
    """Return the squared Frobenius norm of the matrix cut to its size, by transfer matrices (differentiable).

    `E <- sum_mn G[:, m, n, :]^T E G[:, m, n, :]` adds up all entries. Where a shape exceeds the matrix, only the
    indices below its size count. An index is below it if its digits agree with those of the size up to some place and
    are smaller there, so a second matrix tracks the digits that still agree ("tight").
    """
    wide = [core.double() if core.dtype == torch.float64 else core.float() for core in cores]
    start = wide[0].new_ones(1, 1)
    if form.lead:
        start = _transfer(start, wide.pop(0))
    moves = [_moves(size, shape) for size, shape in ((form.out_size, form.out_shape), (form.in_size, form.in_shape))]
    states = {(moves[0][0][0][0], moves[1][0][0][0]): start}
    for k, core in enumerate(wide):
        reached: dict[tuple[bool, bool], Tensor] = {}
        for row_from, row_to, rows in moves[0][k]:
            for column_from, column_to, columns in moves[1][k]:
                state = states.get((row_from, column_from))
                if state is not None and rows.start < rows.stop and columns.start < columns.stop:
                    term = _transfer(state, core[:, rows, columns])
                    reached[row_to, column_to] = reached.get((row_to, column_to), 0) + term
        states = reached
    return states[False, False].sum()


Move = tuple[bool, bool, slice]


def _moves(size: int, shape: Sequence[int]) -> list[list[Move]]:
    """Return for each digit the moves (tight before, tight after, digits); without padding, none is tight."""
    padded = math.prod(shape) > size
    moves: list[list[Move]] = []
    for k, dim in enumerate(shape):
        digit = size // math.prod(shape[k + 1 :]) % dim
        free = (False, False, slice(0, dim))
        tight = [(True, False, slice(0, digit)), (True, True, slice(digit, digit + 1))]
        moves.append(([*tight, free] if k else tight) if padded else [free])
    return moves


def _transfer(state: Tensor, core: Tensor) -> Tensor:
    """Return `sum_mn G[:, m, n, :]^T E G[:, m, n, :]`."""
    left = (state.T @ core.flatten(1)).reshape(core.shape)  # r, m, n, r'
    return left.flatten(0, 2).T @ core.flatten(0, 2)
