"""A linear layer whose weight is a sum of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.decompose import kronecker_sum, rearranged, singular_values, svd
from rankfold.layers._contract import Rank, Spectrum
from rankfold.layers._ranks import CANDIDATES, break_even, check_rank, spread, tail_errors
from rankfold.layers.tensor._structured import Box, StructuredLinear, finite_weight_of, sum_boxes, widened
from rankfold.layers.tensor._tt_chain import RESOLVED, TTForm
from rankfold.layers.tensor._tt_contract import contract
from rankfold.layers.tensor._tt_order import BATCHES, Chain, Sweep, bucket, schedule_sweep
from rankfold.layers.tensor._tt_schedule import for_batches, pick, wants_gradients


@final
class KroneckerLinear(StructuredLinear):
    """A linear layer whose weight is a sum of Kronecker products, `W = sum_r A_r ⊗ B_r`.

    With `out_shape = (m_1, m_2)` and `in_shape = (n_1, n_2)`, A is (rank, m_1, n_1) and B (rank, m_2, n_2): `rank *
    (m_1 n_1 + m_2 n_2)` parameters, few even at ranks of several tens. An input folded to a matrix X gives `sum_r A_r X
    B_r^T`, two matrix products for all terms, in the order that is cheaper for the number of rows; a small weight is
    rebuilt where that is cheaper still. Multiply-adds shrink less than parameters: from `rank = sqrt(out) / 2` on, a
    square layer with balanced shapes takes more of them than the dense one. The weight is that of a tensor train of two
    cores.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to add a bias.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: the number of terms, at most min(m_1 n_1, m_2 n_2).
        in_shape: two dims (n_1, n_2) whose product is at least `in_features`; by default balanced. Larger is padded.
        out_shape: two dims (m_1, m_2) for `out_features`.

    Raises:
        LayerError: a rank out of range, shapes too small or not of two dims.

    Reference:
        Van Loan and Pitsianis (1993), Approximation with Kronecker products.

    Example:
        >>> layer = KroneckerLinear(4096, 4096, rank=4, bias=False)
        >>> layer.options, sum(p.numel() for p in layer.parameters())
        ({'in_shape': (64, 64), 'out_shape': (64, 64)}, 32768)
        >>> dense = nn.Linear(6, 4)
        >>> copy = KroneckerLinear.from_dense(dense, rank=KroneckerLinear.full_rank(dense))
        >>> torch.testing.assert_close(copy.weight, dense.weight)
    """

    method: ClassVar[str] = "kronecker"
    orders: ClassVar[tuple[int, ...]] = (2,)

    def _prepare(self) -> None:
        chain = _chain(self._form, self._rank)
        self._schedules = for_batches(lambda rows, training: schedule_sweep(chain, rows, training=training))

    def schedule(self, rows: int | torch.SymInt, training: bool | None = None) -> Sweep:
        """Return the order of the products for a number of rows; `training` defaults to that of a call here and now."""
        mode = wants_gradients(list(self.cores)) if training is None else training
        return pick(self._schedules, rows, mode)

    def _multiply(self, rows: Tensor) -> Tensor:
        left, right = self.cores
        train = [left.permute(1, 2, 0).unsqueeze(0), right.unsqueeze(3)]  # (1, m_1, n_1, r), (r, m_2, n_2, 1)
        return contract(rows.unsqueeze(2), train, self.schedule(rows.shape[0])).squeeze(2)

    def _matrix(self) -> Tensor:
        left, right = self.cores
        products: Tensor = left.flatten(1).T @ right.flatten(1)  # m_1 n_1, m_2 n_2
        folded = products.reshape(*left.shape[1:], *right.shape[1:])
        return folded.transpose(1, 2).flatten(2).flatten(0, 1)

    def _squared_norm(self, rows: Box, columns: Box) -> Tensor:
        left, right = map(widened, self.cores)
        return _gram(left, right, rows, columns).sum()

    def _stages(self) -> list[Tensor]:
        left, right = self.cores
        return [left.permute(1, 2, 0), right.flatten(0, 1)]

    @staticmethod
    def _shapes(form: TTForm, rank: Rank) -> list[tuple[int, ...]]:
        checked: Any = check_rank(form.owner, rank, KroneckerLinear._full(form))
        return [(checked, m, n) for m, n in zip(form.out_shape, form.in_shape, strict=True)]

    @classmethod
    def _factors(cls, form: TTForm, matrix: Tensor, rank: Rank, seed: int) -> tuple[Tensor, Tensor]:
        found = kronecker_sum(matrix, form.out_shape, form.in_shape, rank, seed=seed)  # type: ignore[arg-type]
        return found.left, found.right

    @staticmethod
    def _macs(form: TTForm, rank: Rank, rows: int) -> int:
        return schedule_sweep(_chain(form, rank), BATCHES[bucket(rows)]).macs(rows)

    @staticmethod
    def _full(form: TTForm) -> int:
        return min(m * n for m, n in zip(form.out_shape, form.in_shape, strict=True))

    @staticmethod
    def _candidates(form: TTForm, multiple: int) -> Sequence[Rank]:
        most = break_even(KroneckerLinear._params(form, 1), form.out_size * form.in_size)
        return spread(min(most, KroneckerLinear._full(form)), multiple, CANDIDATES)

    @classmethod
    def _weight_errors(cls, form: TTForm, matrix: Tensor, ranks: Sequence[Rank], seed: int) -> tuple[float, ...]:
        """Return the errors from one SVD; errors on padding do not count."""
        checked: list[Any] = [*ranks]
        paired = rearranged(matrix, form.out_shape, form.in_shape)
        if paired.numel() == matrix.numel() or not checked:
            return tuple(tail_errors(singular_values(paired), checked))
        return tuple(_padded_errors(form, paired, checked, seed))

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return the singular values of the rearranged weight."""
        form, matrix = cls._form_of(dense, **options), finite_weight_of(cls, dense)
        paired = rearranged(matrix, form.out_shape, form.in_shape)
        rows, columns = paired.shape
        return (Spectrum(singular_values(paired), (rows, columns)),)


def _chain(form: TTForm, rank: Any) -> Chain:
    return Chain(form.out_shape, form.in_shape, (1, rank, 1))


def _gram(left: Tensor, right: Tensor, rows: Box, columns: Box) -> Tensor:
    """Return the inner products of the terms with each other (rank, rank), in a box of the folded weight."""
    one = left[:, rows[0], columns[0]].flatten(1)
    other = right[:, rows[1], columns[1]].flatten(1)
    return (one @ one.T) * (other @ other.T)


def _padded_errors(form: TTForm, paired: Tensor, ranks: Sequence[int], seed: int) -> list[float]:
    """Return the errors where the shapes exceed the weight: tails minus the energy of the terms outside it."""
    found = svd(paired, max(ranks), seed=seed)
    (m1, m2), (n1, n2) = form.out_shape, form.in_shape
    left, right = (found.u * found.s).T.reshape(-1, m1, n1), found.vh.reshape(-1, m2, n2)
    inside = sum_boxes(lambda rows, columns: _gram(left, right, rows, columns).cumsum(0).cumsum(1).diagonal(), form)
    total = float(paired.square().sum()) or 1.0
    energies = found.s.square().cumsum(0)  # of the terms up to each, on the padding too
    tails = (energies[-1] - energies) / total + found.error**2
    errors = []
    for rank in ranks:
        tail, outside = float(tails[rank - 1]), float(energies[rank - 1] - inside[rank - 1]) / total
        errors.append(math.sqrt(max(tail - outside, 0.0) if tail > RESOLVED**2 else max(tail, 0.0)))
    return errors
