"""A linear layer as two: the truncated singular value decomposition of its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.layers._build import (
    Device,
    copy_,
    fill,
    fresh_bias_,
    fresh_uniform_,
    place,
    rescale_,
    take_over,
)
from rankfold.layers._contract import Call, Cost, Metric, Options, Rank
from rankfold.layers._matrix import MatrixLayer, decompose_into, product_norm
from rankfold.layers._metric import corrected_bias
from rankfold.layers._ranks import check_rank

if TYPE_CHECKING:
    from typing_extensions import Self


@final
class LowRankLinear(MatrixLayer):
    """A linear layer as `Linear(in, rank)` and `Linear(rank, out)`: the truncated SVD of its weight.

    `weight = up.weight @ down.weight`, the best approximation of this rank in the Frobenius norm
    (Eckart and Young 1936), with rank * (in + out) weights. The arguments are those of `nn.Linear`, then `rank`,
    at most min(in, out). From rank in * out / (in + out) on it saves nothing.

    Raises:
        LayerError: a rank out of range.

    Example:
        >>> layer = LowRankLinear(512, 512, rank=64)
        >>> layer(torch.ones(2, 512)).shape
        torch.Size([2, 512])
        >>> dense = nn.Linear(6, 4)
        >>> copy = LowRankLinear.from_dense(dense, rank=4)
        >>> torch.testing.assert_close(copy.weight, dense.weight)
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
    ) -> None:
        super().__init__()
        check_rank(type(self).__name__, rank, min(in_features, out_features))
        self.in_features, self.out_features = in_features, out_features
        self.down = place(nn.Linear(in_features, rank, bias=False, device="meta", dtype=dtype), device)
        self.up = place(nn.Linear(rank, out_features, bias=bias, device="meta", dtype=dtype), device)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh `nn.Linear`, 1/3 for white input, and its bias."""
        weights = [self.down.weight, self.up.weight]
        fresh_uniform_(weights, 1 / 3, generator)
        rescale_(weights, self.squared_norm().detach(), self.out_features / 3)
        fresh_bias_(self.bias, self.in_features, generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Apply both factors."""
        hidden = self.down(input)  # …, rank
        output: Tensor = self.up(hidden)  # …, out
        return output

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), rebuilt from the factors on every read (differentiable)."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, which the second factor adds."""
        return self.up.bias

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the weight, from two rank x rank Gram matrices (differentiable)."""
        return product_norm(self.up.weight, self.down.weight)

    def to_dense(self) -> nn.Linear:
        """Return the `nn.Linear` that computes the same function."""
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.up.weight.dtype
        )
        dense = take_over(place(dense, self.up.weight.device), self.up)
        fill(dense, self.weight, self.bias)
        return dense

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:
        """Return one empty set of options if some rank has fewer parameters than the dense layer, or nothing."""
        return ({},) if cls.rank_grid(dense) else ()

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank) -> Cost:
        """Return rank * (in + out) parameters plus the bias, and rank * (in + out) multiply-adds per input row."""
        checked = check_rank(cls.__name__, rank, cls.full_rank(dense))
        twin: Any = dense
        weights = checked * (twin.in_features + twin.out_features)
        rows = sum(math.prod(call.input[:-1]) for call in calls)
        return Cost(weights + (0 if twin.bias is None else twin.out_features), rows * weights)

    @classmethod
    def from_dense(cls, dense: nn.Module, *, rank: Rank, seed: int = 0, metric: Metric | None = None) -> Self:
        """Decompose the weight in float64, in a metric by projection; keeps dtype, device, mode and requires_grad."""
        layer = cls._hollow(dense, rank, None, {})
        rows, columns = layer.up.weight, layer.down.weight
        decompose_into(layer, dense, rows=rows, columns=columns, seed=seed, metric=metric)
        copy_(layer.bias, corrected_bias(dense, layer.weight, metric))
        return layer

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        features = {"in_features": dense.in_features, "out_features": dense.out_features}
        return {**features, "bias": dense.bias is not None}
