"""An embedding as a narrow embedding and a linear map: the truncated singular value decomposition of its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.errors import LayerError
from rankfold.layers._build import (
    Device,
    copy_,
    fill,
    fresh_uniform_,
    place,
    rescale_,
    take_over,
)
from rankfold.layers._contract import Call, Cost, Metric, Options, Rank
from rankfold.layers._matrix import MatrixLayer, decompose_into, product_norm
from rankfold.layers._ranks import check_rank

if TYPE_CHECKING:
    from typing_extensions import Self


@final
class LowRankEmbedding(MatrixLayer):
    """An embedding as `Embedding(num_embeddings, rank)` and `Linear(rank, embedding_dim)`: the SVD of its table.

    `weight = down.weight @ up.weight.T`, the best approximation of this rank in the Frobenius norm. The
    arguments are those of `nn.Embedding`, then `rank`, at most min(num_embeddings, embedding_dim).
    `sparse` and `scale_grad_by_freq` act on the gradient of `down`. A row of zeros at `padding_idx` stays zero.

    Raises:
        LayerError: a rank out of range, or a `max_norm`: it would rescale rows of a table that does not exist here.

    Reference:
        Lan et al. 2020 (ALBERT), section 3.1.

    Example:
        >>> layer = LowRankEmbedding(1000, 64, padding_idx=0, rank=8)
        >>> layer(torch.tensor([[0, 3]])).shape
        torch.Size([1, 2, 64])
        >>> layer.tied_head()(torch.ones(5, 64)).shape
        torch.Size([5, 1000])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(  # noqa: PLR0913 - the signature of the dense twin
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
        rank: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if max_norm is not None:
            raise LayerError(f"{name}: max_norm={max_norm} rescales rows of the dense table at each look-up; use None")
        check_rank(name, rank, min(num_embeddings, embedding_dim))
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.max_norm, self.norm_type = None, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        narrow = nn.Embedding(
            num_embeddings,
            rank,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device="meta",
            dtype=dtype,
        )
        self.padding_idx = narrow.padding_idx
        self.down = place(narrow, device)
        self.up = place(nn.Linear(rank, embedding_dim, bias=False, device="meta", dtype=dtype), device)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the variance of a fresh `nn.Embedding`, 1; the row at `padding_idx` is zero."""
        # A look-up sums nothing: each entry of the codes is a stage of fan-in 1.
        fresh_uniform_([self.down.weight.view(-1, 1), self.up.weight], 1.0, generator)
        copy_(self._padding_row(), torch.zeros(()))
        filled = self.num_embeddings - (self.padding_idx is not None)
        rescale_([self.down.weight, self.up.weight], self.squared_norm().detach(), filled * self.embedding_dim)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Embedding gives it
        """Look up the codes and map them to the embedding's dims."""
        codes = self.down(input)  # …, rank
        rows: Tensor = self.up(codes)  # …, dim
        return rows

    @property
    def weight(self) -> Tensor:
        """The dense table (num_embeddings, embedding_dim), rebuilt on every read (differentiable)."""
        return self.down.weight @ self.up.weight.T

    @weight.setter
    def weight(self, table: Tensor) -> None:
        """Accept only the table that it already has, as `TiedHead.weight` does."""
        _check_own(self, table)

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the table, from two rank x rank Gram matrices (differentiable)."""
        return product_norm(self.down.weight, self.up.weight.T)

    def to_dense(self) -> nn.Embedding:
        """Return the `nn.Embedding` that computes the same function."""
        dense = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
            dtype=self.up.weight.dtype,
        )
        dense = take_over(place(dense, self.up.weight.device), self.up)
        fill(dense, self.weight, None)
        return dense

    def tied_head(self, bias: bool | Tensor = False) -> TiedHead:
        """Return the output layer of a language model that shares these factors.

        `bias`: True for a bias of zeros, or its initial values (num_embeddings,).
        """
        return TiedHead(self, bias)

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:
        """Return one empty set of options if some rank has fewer parameters than the dense layer, or nothing."""
        rescaled = getattr(dense, "max_norm", None) is not None
        return ({},) if not rescaled and cls.rank_grid(dense) else ()

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank) -> Cost:
        """Return rank * (rows + dim) parameters, and rank * dim multiply-adds per row looked up."""
        checked: Any = check_rank(cls.__name__, rank, cls.full_rank(dense))
        twin: Any = dense
        rows = sum(math.prod(call.input) for call in calls)
        return Cost(checked * (twin.num_embeddings + twin.embedding_dim), rows * checked * twin.embedding_dim)

    @classmethod
    def from_dense(cls, dense: nn.Module, *, rank: Rank, seed: int = 0, metric: Metric | None = None) -> Self:
        """Decompose the table in float64; keeps options, dtype, device, mode and requires_grad.

        The inputs of an embedding are indices, so a metric is that of the inputs of a head tied to it, never centred.
        """
        layer = cls._hollow(dense, rank, None, {})
        rows, columns = layer.down.weight, layer.up.weight.T
        decompose_into(layer, dense, rows=rows, columns=columns, seed=seed, metric=metric)
        if layer.padding_idx is not None and not bool(dense.weight[layer.padding_idx].any()):  # type: ignore[index]
            copy_(layer._padding_row(), torch.zeros(()))  # exactly, not just to rounding
        return layer

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type")
        return {name: getattr(dense, name) for name in (*names, "scale_grad_by_freq", "sparse")}

    def _padding_row(self) -> Tensor | None:
        """Return the codes of the padding row, or None if there is no such row or it has no values."""
        if self.padding_idx is None or self.down.weight.is_meta:
            return None
        return self.down.weight[self.padding_idx]


@final
class TiedHead(nn.Module):
    """The output layer tied to an embedding of two stages: `x @ embedding.weight.T + bias`, without building the table.

    It shares the modules of the embedding, so training either one trains both. The embedding is a
    `LowRankEmbedding`, or a layer of another class of `tied_methods`. `bias`: see `LowRankEmbedding.tied_head`.

    Example:
        >>> embedding = LowRankEmbedding(100, 16, rank=4)
        >>> head = embedding.tied_head(bias=True)
        >>> torch.testing.assert_close(head(torch.ones(2, 16)), torch.ones(2, 16) @ embedding.weight.T)
    """

    bias: nn.Parameter | None
    down: nn.Embedding
    up: nn.Linear

    def __init__(self, embedding: Any, bias: bool | Tensor = False) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.down, self.up = embedding.down, embedding.up
        values = None if bias is False else nn.Parameter(self.up.weight.new_zeros(self.out_features))
        if isinstance(bias, Tensor) and bias.shape != (self.out_features,):
            raise LayerError(f"TiedHead: a bias of shape {tuple(bias.shape)} does not fit {self.out_features} outputs")
        copy_(values, bias if isinstance(bias, Tensor) else None)
        self.register_parameter("bias", values)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Apply the factors of the embedding, transposed."""
        codes = functional.linear(input, self._columns())  # …, rank
        return functional.linear(codes, self.down.weight, self.bias)  # …, rows of the table

    @property
    def weight(self) -> Tensor:
        """The dense table (num_embeddings, embedding_dim), rebuilt on every read (differentiable)."""
        return self.down.weight @ self._columns()

    @weight.setter
    def weight(self, table: Tensor) -> None:
        """Accept only the table that it already has: transformers 4 ties a head by assigning it."""
        _check_own(self, table)

    def to_dense(self) -> nn.Linear:
        """Return the `nn.Linear` that computes the same function, no longer tied."""
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.down.weight.dtype
        )
        dense = place(dense, self.down.weight.device).train(self.training)
        fill(dense, self.weight, self.bias)
        return dense

    def _columns(self) -> Tensor:
        """Return the second factor (rank, embedding_dim), dequantised where the stage is quantised."""
        weight: Any = self.up.weight
        columns: Tensor = weight.T if isinstance(weight, Tensor) else weight().dequantize().T
        return columns

    @property
    def rank(self) -> int:
        """The rank of the table."""
        return self.up.in_features

    def macs(self, calls: Sequence[Call]) -> int:
        """Return the multiply-adds of all calls together."""
        return head_macs(self.out_features, self.in_features, calls, rank=self.rank)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _check_own(layer: LowRankEmbedding | TiedHead, table: Tensor) -> None:
    own = layer.down.weight @ layer.up.weight.T
    if table.shape != own.shape or not (own.is_meta or torch.equal(table, own)):
        raise LayerError(f"{type(layer).__name__}: its weight is a product: change the factors `down` and `up` instead")


def head_macs(rows: int, dim: int, calls: Sequence[Call], *, rank: int) -> int:
    """Return the multiply-adds of a `TiedHead` for a table (rows, dim): rank * (rows + dim) per vector."""
    return rank * (rows + dim) * sum(math.prod(call.input[:-1]) for call in calls)
