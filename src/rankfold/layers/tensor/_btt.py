"""The block tensor-train layer of Qiu et al. (2024): a grid of blocks of low rank, two batched products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.decompose import block_singular_values, block_tensor_train
from rankfold.layers._contract import Rank, Spectrum
from rankfold.layers._matrix import product_norm
from rankfold.layers._ranks import CANDIDATES, break_even, check_rank, spread, tail_errors
from rankfold.layers.tensor._structured import Box, StructuredLinear, finite_weight_of, widened
from rankfold.layers.tensor._tt_chain import TTForm

FEW_ROWS = 16
"""Up to this many rows are multiplied from the left, where the blocks are read once and little else is moved."""


@final
class BTTLinear(StructuredLinear):
    """A linear layer whose weight is a grid of blocks of low rank: a block tensor train, at rank 1 a Monarch matrix.

    With `out_shape = (n_1, n_2)` and `in_shape = (m_2, m_1)`, row-major, the weight is a grid of `n_1 x m_2` blocks
    `L[i, k] R[i, k]` of `n_2 x m_1` neighbouring entries. The forward pass is two batched matrix products with a
    transposition between them: R maps each of the m_2 parts of the input to `n_1 * rank` values, L each of the n_1
    groups of `m_2 * rank` values to a part of the output. It has as many parameters as multiply-adds per row, `rank *
    (m_2 * out + n_1 * in)`: unlike in a tensor train, both shrink together. The decomposition of a dense weight is
    optimal, block by block. At large ranks a low-rank or a dense layer is faster.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to add a bias.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: of each block, at most min(n_2, m_1).
        in_shape: two dims (m_2, m_1) whose product is at least `in_features`; by default balanced. Larger is padded.
        out_shape: two dims (n_1, n_2) for `out_features`.

    Raises:
        LayerError: a rank out of range, shapes too small or not of two dims.

    Reference:
        Qiu et al. (2024), Compute better spent, section 4; Dao et al. (2022), Monarch.

    Example:
        >>> layer = BTTLinear(4096, 4096, rank=1, bias=False)
        >>> layer.options, sum(p.numel() for p in layer.parameters())
        ({'in_shape': (64, 64), 'out_shape': (64, 64)}, 524288)
        >>> dense = nn.Linear(6, 4)
        >>> copy = BTTLinear.from_dense(dense, rank=BTTLinear.full_rank(dense))
        >>> torch.testing.assert_close(copy.weight, dense.weight)
    """

    method: ClassVar[str] = "btt"
    orders: ClassVar[tuple[int, ...]] = (2,)

    def _prepare(self) -> None:
        (self._down, self._height), (self._across, self._width) = self._form.out_shape, self._form.in_shape

    def _multiply(self, rows: Tensor) -> Tensor:
        first, second = self.cores  # (m_2, n_1 r, m_1), (n_1, n_2, m_2 r)
        rank = second.shape[2] // self._across
        parts = rows.reshape(-1, self._across, self._width)  # rows, m_2, m_1
        if isinstance(rows.shape[0], int) and rows.shape[0] <= FEW_ROWS:
            hidden = parts.transpose(0, 1) @ first.mT  # m_2, rows, n_1 r
            hidden = hidden.reshape(self._across, -1, self._down, rank).permute(2, 1, 0, 3).flatten(2)
            output: Tensor = (hidden @ second.mT).transpose(0, 1)  # rows, n_1, n_2
            return output.flatten(1)
        hidden = first @ parts.permute(1, 2, 0)  # m_2, n_1 r, rows
        hidden = hidden.reshape(self._across, self._down, rank, -1).transpose(0, 1).flatten(1, 2)
        output = (second @ hidden).permute(2, 0, 1)  # rows, n_1, n_2
        return output.flatten(1)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the blocks, (n_1, m_2, n_2, rank) and (n_1, m_2, rank, m_1)."""
        first, second = self.cores
        left = second.reshape(self._down, self._height, self._across, -1).transpose(1, 2)
        return left, first.reshape(self._across, self._down, -1, self._width).transpose(0, 1)

    def _matrix(self) -> Tensor:
        left, right = self._pair()
        return (left @ right).transpose(1, 2).flatten(2).flatten(0, 1)

    def _squared_norm(self, rows: Box, columns: Box) -> Tensor:
        left, right = map(widened, self._pair())
        return product_norm(left[rows[0], columns[0], rows[1]], right[rows[0], columns[0], :, columns[1]])

    def _stages(self) -> list[Tensor]:
        return [core.flatten(0, 1) for core in self.cores]

    @staticmethod
    def _shapes(form: TTForm, rank: Rank) -> list[tuple[int, ...]]:
        checked: Any = check_rank(form.owner, rank, BTTLinear._full(form))
        (down, height), (across, width) = form.out_shape, form.in_shape
        return [(across, down * checked, width), (down, height, across * checked)]

    @classmethod
    def _factors(cls, form: TTForm, matrix: Tensor, rank: Rank, seed: int) -> tuple[Tensor, Tensor]:
        del seed  # nothing is random
        found = block_tensor_train(matrix, form.out_shape, form.in_shape, rank)  # type: ignore[arg-type]
        first = found.right.transpose(0, 1).flatten(1, 2)  # across, down rank, width
        return first, found.left.transpose(1, 2).flatten(2)  # down, height, across rank

    @staticmethod
    def _macs(form: TTForm, rank: Rank, rows: int) -> int:
        return rows * BTTLinear._params(form, rank)

    @staticmethod
    def _full(form: TTForm) -> int:
        return min(form.out_shape[1], form.in_shape[1])

    @staticmethod
    def _candidates(form: TTForm, multiple: int) -> Sequence[Rank]:
        most = break_even(BTTLinear._params(form, 1), form.out_size * form.in_size)
        return spread(min(most, BTTLinear._full(form)), multiple, CANDIDATES)

    @classmethod
    def _weight_errors(cls, form: TTForm, matrix: Tensor, ranks: Sequence[Rank], seed: int) -> tuple[float, ...]:
        """Return the errors from the singular values of every block."""
        del seed  # nothing is random
        checked: list[Any] = [*ranks]
        return tuple(tail_errors(_block_values(form, matrix), checked))

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return the blocks' singular values, combined as roots of sums of squares: their tails are the errors."""
        form, matrix = cls._form_of(dense, **options), finite_weight_of(cls, dense)
        return (Spectrum(_block_values(form, matrix), (form.out_shape[1], form.in_shape[1])),)


def _block_values(form: TTForm, matrix: Tensor) -> Tensor:
    """Return the singular values of the blocks, combined over the blocks as roots of sums of squares."""
    values = block_singular_values(matrix, form.out_shape, form.in_shape)
    norms: Tensor = torch.linalg.vector_norm(values, dim=(0, 1))
    return norms
