"""The tensor-train embedding of Khrulkov et al. (2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import LayerError
from rankfold.layers._build import Device, check_type, finite_weight
from rankfold.layers._contract import Call, Cost, Rank
from rankfold.layers.tensor._tt_chain import TTForm, make_form
from rankfold.layers.tensor._tt_layer import TTLayer
from rankfold.layers.tensor._tt_rows import RowSchedule, bucket_of, row_schedules, table_rows

REFUSED = {
    "max_norm": "it rescales rows of the table in place, and a train has none; normalise the output",
    "scale_grad_by_freq": "it scales the gradient of a row, and rows share their cores",
    "sparse": "rows share their cores, so that the gradients of these are dense; use sparse=False",
}


def _refuse(dense: Any) -> None:
    for name, reason in REFUSED.items():
        if getattr(dense, name):
            raise LayerError(f"TTEmbedding cannot keep {name}={getattr(dense, name)!r}: {reason}")


@final
class TTEmbedding(TTLayer):
    """An embedding whose table is a tensor train: a row is a product of one slice of each core.

    With the digits `(i_1 ... i_d)` of index i in the radices `in_shape`, `row(i) = G_1[:, i_1] ... G_d[:, i_d]`, each
    slice (r, dim_k, r'). The slices are gathered and multiplied in a batch; before that, neighbouring cores are
    merged where this leaves less to gather (`schedule`). An index that occurs several times is computed once, except in
    a compiled or exported program, where sizes must not depend on values. The table is never built. The output at
    `padding_idx` is zero and passes no gradient back.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of each row.
        padding_idx: the index whose row is zero.
        max_norm: refused, as are `scale_grad_by_freq` and `sparse`: rows share their cores.
        norm_type: that of `max_norm`, only there to mirror `nn.Embedding`.
        scale_grad_by_freq: refused.
        sparse: refused.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: a cap for every bond, clipped to what each can have, or one per bond.
        in_shape: radices of the index, whose product is at least `num_embeddings`; by default balanced.
        out_shape: as many dims, whose product is at least `embedding_dim`.

    Raises:
        LayerError: an option that cannot be kept, a rank out of range, shapes too small or of different lengths.

    Reference:
        Khrulkov, Hrinchuk, Mirvakhabova, Oseledets (2019), Tensorized embedding layers.

    Example:
        >>> import torch
        >>> layer = TTEmbedding(1000, 64, rank=4)
        >>> tuple(layer(torch.tensor([[1, 999]])).shape)
        (1, 2, 64)
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(  # noqa: PLR0913 (the signature of nn.Embedding)
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        _refuse(self)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise LayerError(f"TTEmbedding: padding_idx={padding_idx} is not an index of {num_embeddings} rows")
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        form = make_form("TTEmbedding", (embedding_dim, num_embeddings), in_shape, out_shape)
        self._assemble(form, rank, device, dtype)
        self._schedules = row_schedules(self._chain)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the variance of a fresh `nn.Embedding`, 1, outside the row at `padding_idx`."""
        filled = self.num_embeddings - (self.padding_idx is not None)
        self._fresh(float(filled * self.embedding_dim), generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Embedding gives it
        """Return the rows of the indices."""
        if torch.compiler.is_compiling() or input.is_meta or not input.numel():
            output = self._rows(input.reshape(-1)).reshape(*input.shape, self.embedding_dim)
        else:
            output = self._distinct_rows(input)
        if self.padding_idx is None:
            return output
        return output.masked_fill((input == self.padding_idx).unsqueeze(-1), 0)

    def schedule(self, rows: int) -> RowSchedule:
        """Return which cores are merged before the look-up, and the order of the products, for distinct rows."""
        return self._schedules[bucket_of(rows)]

    def _distinct_rows(self, indices: Tensor) -> Tensor:
        """Return the rows of the indices, computing each distinct index once."""
        distinct, places = torch.unique(indices, return_inverse=True)  # sorted; places has the shape of indices
        if int(distinct[0]) < 0 or int(distinct[-1]) >= self.num_embeddings:
            raise IndexError(f"TTEmbedding: index out of range of its {self.num_embeddings} rows")
        return functional.embedding(places, self._rows(distinct))

    def _rows(self, indices: Tensor) -> Tensor:
        schedule = self._schedules[bucket_of(indices.shape[0])]
        rows = table_rows(list(self.cores), self._form.in_shape, indices, schedule)
        # slicing off nothing would still copy the gradient
        return rows if rows.shape[1] == self.embedding_dim else rows[:, : self.embedding_dim]

    @property
    def weight(self) -> Tensor:
        """The table (num_embeddings, embedding_dim), rebuilt from the cores on every read (differentiable)."""
        table: Tensor = self._matrix().T
        if self.padding_idx is None:
            return table
        padding = torch.arange(self.num_embeddings, device=table.device) == self.padding_idx
        filled: Tensor = table.masked_fill(padding.unsqueeze(1), 0)
        return filled

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the table, from transfer matrices of the cores (differentiable)."""
        norm = super().squared_norm()
        if self.padding_idx is None:
            return norm
        row = self._rows(torch.tensor([self.padding_idx], device=self.cores[0].device))
        return norm - row.to(norm.dtype).square().sum()

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return parameters, and multiply-adds of the schedule for each call, as if all its indices were distinct."""
        form = cls._form_of(dense, **options)
        schedules, rows = row_schedules(form.chain(rank)), [math.prod(call.input) for call in calls]
        return Cost(form.params(rank), sum(schedules[bucket_of(count)].macs(count) for count in rows))

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", *REFUSED)
        return {name: getattr(dense, name) for name in names}

    @classmethod
    def _form_of(
        cls, dense: Any, *, in_shape: Sequence[int] | None = None, out_shape: Sequence[int] | None = None
    ) -> TTForm:
        check_type(cls, dense, nn.Embedding)
        _refuse(dense)
        return make_form("TTEmbedding", (dense.embedding_dim, dense.num_embeddings), in_shape, out_shape)

    @classmethod
    def _matrix_of(cls, dense: Any) -> Tensor:
        check_type(cls, dense, nn.Embedding)
        table = finite_weight(cls, dense)
        if dense.padding_idx is not None and bool(table[dense.padding_idx].any()):
            row = f"the row of padding_idx={dense.padding_idx}"
            raise LayerError(f"TTEmbedding: {row} is not zero, and this layer's is; zero it or drop padding_idx")
        return table.T
