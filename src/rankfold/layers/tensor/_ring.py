"""The tensor-ring layer: a tensor train whose ends are tied by one more bond."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias, final

import torch
from torch import Tensor, nn

from rankfold.decompose import ring_bonds, tensor_ring
from rankfold.errors import DecompositionError, LayerError
from rankfold.layers._build import LARGEST_MERGE
from rankfold.layers._contract import Rank, Spectrum
from rankfold.layers._ranks import check_rank, spread
from rankfold.layers.tensor._structured import Box, StructuredLinear, sum_boxes, widened
from rankfold.layers.tensor._tt_chain import RESOLVED, TTForm
from rankfold.layers.tensor._tt_contract import matrices_of, merge, sweep_state
from rankfold.layers.tensor._tt_order import BATCHES, CHUNK, Chain, Sweep, bucket, schedule_sweep
from rankfold.layers.tensor._tt_schedule import for_batches, pick, wants_gradients

Shape: TypeAlias = tuple[int, int, int, int]

REFINING = 5e10
"""Multiply-adds that refining a decomposition may take: planning large layers at many ranks has to stay quick."""
REFINING_SWEEPS = 20
CANDIDATES = 16
"""Few, because each is decomposed on its own to find its error."""


@dataclass(frozen=True)
class RingSchedule:
    """How a ring is applied to rows: cut after its first `head` cores, or rebuilt.

    Attributes:
        head: how many cores are merged and applied last, closing the ring; 0 if the weight is rebuilt instead.
        sweep: the order of the other cores, a train whose ends carry the two bonds that were cut as outputs.
        chunk: rows taken at a time, to keep intermediates within the bound for tensor trains.
        fixed_macs: multiply-adds of merging, once per call.
        row_macs: multiply-adds per row.
        score: the cost model's estimate.
        merging: the order of the products that merge the first cores, or all but the last where the weight is rebuilt.
    """

    head: int
    sweep: Sweep | None
    chunk: int
    fixed_macs: int
    row_macs: int
    score: float
    merging: tuple[int, ...]

    def macs(self, rows: int) -> int:
        """Return the multiply-adds for a number of rows."""
        return self.fixed_macs + rows * self.row_macs


@final
class TRLinear(StructuredLinear):
    """A linear layer whose weight is a tensor ring over paired modes of outputs and inputs.

    `W[(i_1 ... i_d), (j_1 ... j_d)] = trace(G_1[:, i_1, j_1] ... G_d[:, i_d, j_d])`, with cores
    (r_k, m_k, n_k, r_k+1) and `r_d = r_0`: where a tensor train has two small cores at its ends, a ring has none. The
    forward pass cuts the ring: the last cores are applied as a train that carries both cut bonds, then the first ones
    close it; or the weight is rebuilt where that is cheaper and the weight small. The bond that closes the ring is
    carried all the way, so a ring takes about that many times the multiply-adds of a train. With two cores a
    ring is a sum of `r_0 r_1` Kronecker products: use `KroneckerLinear`, whose decomposition is optimal.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to add a bias.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: a cap for every bond, clipped to what each can have, or one per core: its left bond.
        in_shape: dims whose product is at least `in_features`; by default 3 or 4, balanced. Larger is padded.
        out_shape: as many dims for `out_features`.

    Raises:
        LayerError: a rank out of range, shapes too small or of different lengths.

    Reference:
        Zhao et al. (2016), Tensor ring decomposition; Wang et al. (2018), Wide compression: tensor ring nets.

    Example:
        >>> layer = TRLinear(4096, 4096, rank=4, in_shape=(8,) * 4, out_shape=(8,) * 4, bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        4096
        >>> dense = nn.Linear(8, 8)
        >>> copy = TRLinear.from_dense(dense, rank=TRLinear.full_rank(dense))
        >>> torch.testing.assert_close(copy.weight, dense.weight)
    """

    method: ClassVar[str] = "ring"
    orders: ClassVar[tuple[int, ...]] = (3, 4)

    def _prepare(self) -> None:
        shapes = tuple(_core_shapes(self._form, self._rank))
        self._merging = _chain(shapes[:-1]).merge(0, len(shapes) - 1).order
        self._schedules = for_batches(lambda rows, training: schedule_ring(shapes, rows, training=training))

    def schedule(self, rows: int | torch.SymInt, training: bool | None = None) -> RingSchedule:
        """Return the order of contraction for a number of rows; `training` defaults to that of a call here and now."""
        mode = wants_gradients(list(self.cores)) if training is None else training
        return pick(self._schedules, rows, mode)

    def _multiply(self, rows: Tensor) -> Tensor:
        schedule, cores = self.schedule(rows.shape[0]), list(self.cores)
        if schedule.sweep is None:
            return rows @ self._matrix().T
        head, tail = merge(cores[: schedule.head], schedule.merging), open_tail(cores[schedule.head :])
        sweep, matrices = schedule.sweep, matrices_of(tail, schedule.sweep)
        ring, m, n, bond = head.shape
        closing = head.permute(1, 2, 3, 0).reshape(m, n * bond * ring)
        outputs, inputs = math.prod(self._form.out_shape) // m, math.prod(self._form.in_shape) // n  # of the tail

        def run(part: Tensor) -> Tensor:
            state = sweep_state(part.reshape(part.shape[0] * n, inputs, 1), matrices, sweep)
            state = state.reshape(part.shape[0], n * bond, outputs, ring).transpose(2, 3)
            output: Tensor = closing @ state.reshape(part.shape[0], n * bond * ring, outputs)
            return output.flatten(1)  # rows, m and the outputs of the tail

        if torch.compiler.is_compiling() or rows.shape[0] <= schedule.chunk:  # the number of rows may be symbolic
            return run(rows)
        parts = torch.split(rows, schedule.chunk)
        return torch.cat([run(part) for part in parts])

    def _matrix(self) -> Tensor:
        return ring_matrix(list(self.cores), self._merging)

    def _squared_norm(self, rows: Box, columns: Box) -> Tensor:
        return squared_norm(list(self.cores), rows, columns)

    def _stages(self) -> list[Tensor]:
        return [core.flatten(2).flatten(0, 1) for core in self.cores]

    @staticmethod
    def _shapes(form: TTForm, rank: Rank) -> list[tuple[int, ...]]:
        return [*_core_shapes(form, rank)]

    @classmethod
    def _factors(cls, form: TTForm, matrix: Tensor, rank: Rank, seed: int) -> list[Tensor]:
        del seed  # nothing is random
        return _decomposed(form, form.fold(matrix), rank)[0]

    @staticmethod
    def _macs(form: TTForm, rank: Rank, rows: int) -> int:
        return schedule_ring(tuple(_core_shapes(form, rank)), BATCHES[bucket(rows)]).macs(rows)

    @staticmethod
    def _full(form: TTForm) -> int:
        return max(ring_bonds(form.modes, None))

    @staticmethod
    def _candidates(form: TTForm, multiple: int) -> Sequence[Rank]:
        caps = range(1, TRLinear._full(form) + 1)
        paying = bisect_left(caps, form.out_size * form.in_size, key=lambda cap: TRLinear._params(form, cap))
        return spread(paying, multiple, CANDIDATES)

    @classmethod
    def _weight_errors(cls, form: TTForm, matrix: Tensor, ranks: Sequence[Rank], seed: int) -> tuple[float, ...]:
        """Return the error of a decomposition at each rank; errors on padding do not count."""
        del seed  # nothing is random
        whole = form.fold(matrix)
        total = float(whole.square().sum()) or 1.0
        errors = []
        for rank in ranks:
            cores, error = _decomposed(form, whole, rank)
            if whole.numel() > matrix.numel() and error > RESOLVED:
                inside = sum_boxes(lambda rows, columns: squared_norm(cores, rows, columns), form)  # noqa: B023
                every = squared_norm(cores, (slice(None),) * len(cores), (slice(None),) * len(cores))
                error = math.sqrt(max(error**2 - float(every - inside) / total, 0.0))
            errors.append(error)
        return tuple(errors)

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return nothing: a single cap covers all bonds, so there is no spectrum per entry of the rank."""
        del dense, options
        return ()


def _core_shapes(form: TTForm, rank: Rank) -> list[Shape]:
    """Return the shapes of all cores at a rank, or raise a `LayerError`."""
    full = ring_bonds(form.modes, None)
    checked = check_rank(form.owner, rank, full if isinstance(rank, (tuple, list)) else max(full))
    try:
        bonds = ring_bonds(form.modes, checked)
    except DecompositionError as error:
        raise LayerError(f"{form.owner}: {error}") from error
    return list(zip(bonds, form.out_shape, form.in_shape, (*bonds[1:], bonds[0]), strict=True))


def _decomposed(form: TTForm, folded: Tensor, rank: Rank) -> tuple[list[Tensor], float]:
    """Return the cores of a folded weight in its dtype, and the error, padding included."""
    shapes = _core_shapes(form, rank)
    sweep = sum(folded.numel() * before * after for before, _, _, after in shapes)
    found = tensor_ring(
        folded, tuple(shape[0] for shape in shapes), iterations=min(REFINING_SWEEPS, int(REFINING // sweep))
    )
    return [core.reshape(shape) for core, shape in zip(found.cores, shapes, strict=True)], found.error


@lru_cache(maxsize=4096)
def schedule_ring(shapes: tuple[Shape, ...], rows: int, *, training: bool = False) -> RingSchedule:
    """Return the cheapest way to apply a ring of cores of these shapes to a number of rows."""
    ways = [_cut_after(shapes, head, rows, training) for head in range(1, len(shapes))]
    entries = math.prod(m * n for _, m, n, _ in shapes)
    if entries <= LARGEST_MERGE:
        ways.append(_rebuilt(shapes, rows, training))
    return min(ways, key=lambda way: way.score)


def _cut_after(shapes: tuple[Shape, ...], head: int, rows: int, training: bool) -> RingSchedule:
    """Return the schedule with the first `head` cores merged and applied after the train of the others."""
    first = _chain(shapes[:head])
    out, columns = math.prod(first.out_shape), math.prod(first.in_shape)
    sweep = schedule_sweep(_tail_chain(shapes[head:]), rows * columns, training=training)
    carried = math.prod(shape[1] for shape in shapes[head:])
    closing = _product(out, first.core(0, head) // out, rows, training, columns=carried)
    merging = _merging(first, training)
    state = columns * shapes[head][0] * carried * shapes[0][0]
    largest = CHUNK // sweep.chunk if sweep.chunk else 0  # entries per row of the train
    return RingSchedule(
        head,
        sweep,
        max(1, CHUNK // max(state, columns * largest)),
        sweep.fixed_macs + merging.fixed_macs,
        sweep.row_macs * columns + closing.row_macs * carried,
        sweep.score + closing.score + merging.score,
        first.merge(0, head).order,
    )


def _rebuilt(shapes: tuple[Shape, ...], rows: int, training: bool) -> RingSchedule:
    """Return the schedule that rebuilds the weight."""
    head, (bond, m, n, ring) = _chain(shapes[:-1]), shapes[-1]
    ends = head.core(0, len(shapes) - 1) // (bond * ring)
    closing = _product(m * n, bond * ring, ends, training)
    product = _product(math.prod(head.out_shape) * m, math.prod(head.in_shape) * n, rows, training)
    merging = _merging(head, training)
    fixed = merging.fixed_macs + closing.macs(ends)
    score, order = product.score + closing.score + merging.score, head.merge(0, len(shapes) - 1).order
    return RingSchedule(0, None, 0, fixed, product.row_macs, score, order)


def _merging(chain: Chain, training: bool) -> Sweep:
    """Return the cost of merging all cores of a chain."""
    joins = chain.merge(0, len(chain.out_shape)).joins
    scores = [_product(columns, bond, rows, training).score for rows, bond, columns in joins]
    return Sweep((), True, fixed_macs=sum(map(math.prod, joins)), score=sum(scores))


def _product(out: int, into: int, rows: int, training: bool, *, columns: int = 1) -> Sweep:
    """Return the cost of multiplying one matrix by rows, each of `columns` columns; MACs are per column."""
    return schedule_sweep(Chain((out,), (into,), (1, 1)), rows, training=training, columns=columns)


def _chain(shapes: Sequence[Shape]) -> Chain:
    ranks, out_shape, in_shape, after = zip(*shapes, strict=True)
    return Chain(out_shape, in_shape, (*ranks, after[-1]))


def _tail_chain(shapes: Sequence[Shape]) -> Chain:
    """Return the sizes of the train that `open_tail` makes."""
    out_shape = [shape[1] for shape in shapes]
    out_shape[0] *= shapes[0][0]
    out_shape[-1] *= shapes[-1][3]
    inner = [shape[0] for shape in shapes[1:]]
    return Chain(tuple(out_shape), tuple(shape[2] for shape in shapes), (1, *inner, 1))


def open_tail(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the last cores of a ring as a train: its two open bonds become parts of the first and the last output."""
    first, *others = cores
    opened = [first.flatten(0, 1).unsqueeze(0), *others]  # 1, r m, n, r'
    last = opened.pop()
    before, m, n, ring = last.shape
    return [*opened, last.permute(0, 1, 3, 2).reshape(before, m * ring, n, 1)]


def ring_matrix(cores: Sequence[Tensor], merging: Sequence[int]) -> Tensor:
    """Return the padded weight of a ring, all cores but the last merged in an order (differentiable)."""
    head, last = merge(cores[:-1], merging), cores[-1]
    ring, m, n, bond = head.shape
    _, p, q, _ = last.shape
    product = head.permute(1, 2, 3, 0).reshape(m * n, bond * ring) @ last.permute(0, 3, 1, 2).reshape(
        bond * ring, p * q
    )
    return product.reshape(m, n, p, q).transpose(1, 2).reshape(m * p, n * q)


def squared_norm(cores: Sequence[Tensor], rows: Box, columns: Box) -> Tensor:
    """Return the squared norm of a box of the folded ring, by transfer matrices (differentiable)."""
    wide = [widened(core) for core in cores]
    ring = wide[0].shape[0]
    state = torch.eye(ring * ring, dtype=wide[0].dtype, device=wide[0].device).reshape(-1, ring, ring)
    for core, i, j in zip(wide, rows, columns, strict=True):
        part = core[:, i, j].flatten(1, 2)  # r, m n, r'
        before, _, after = part.shape
        half = state.transpose(1, 2) @ part.reshape(before, -1)  # ring ring, r, m n r'
        state = half.reshape(len(state), -1, after).transpose(1, 2) @ part.reshape(-1, after)
    return state.reshape(ring * ring, -1).diagonal().sum()
