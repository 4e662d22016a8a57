"""Layers in SVD form, U diag(s) Vᵀ with s a parameter: the form in which a network trains to find its ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.decompose import svd
from rankfold.layers._build import Device, copy_, fill, finite_weight, fresh_bias_, laid_as, place, take_over
from rankfold.layers._contract import Call, Cost, FactorisedLayer, Metric, Options, Rank, Spectrum, Stages
from rankfold.layers._linear import LowRankLinear
from rankfold.layers._matrix import product_norm
from rankfold.layers._metric import corrected_bias, group_metrics, measured_errors, output_error
from rankfold.layers._ranks import check_rank
from rankfold.layers._twin import TwinLayer
from rankfold.layers._unfolding import folded, unfolded

if TYPE_CHECKING:
    from typing_extensions import Self


class SVDForm(TwinLayer):
    """A layer whose weight is U diag(s) Vᵀ; the final classes say which plain low-rank layer it becomes.

    The stages are those of the plain layer: `down` holds Vᵀ, `up` holds U and the bias, and `scale` holds s, one group
    after the other. The forward pass multiplies the weight of `down` by s itself rather than both factors by its root,
    whose slope at 0 is infinite. Where rebuilding U diag(s) Vᵀ and applying it takes fewer multiply-adds than the two
    stages, as it does near full rank on a large input, that is done instead. Only the training keeps U and V
    orthonormal and s positive.
    """

    method: ClassVar[str] = "svd_form"
    only_trained: ClassVar[bool] = True  # a form to train in, never planned
    stages: ClassVar[Stages | None] = Stages({"split": "channel"}, plain=False)  # the values are between the two
    plain: ClassVar[Any]  # the class of plain low-rank layers with the same stages

    down: Any
    up: Any
    scale: nn.Parameter

    def _take_stages(self, plain: Any, shape: tuple[int, ...], device: Device) -> None:
        """Take over the empty stages of a plain layer and draw fresh values; `shape` is that of the weight."""
        self._shape = shape
        self.down, self.up = place(plain.down, device), place(plain.up, device)
        weight: Tensor = self.down.weight
        self.scale = nn.Parameter(torch.empty(weight.shape[0], device=weight.device, dtype=weight.dtype))
        self.reset_parameters()

    @property
    @abstractmethod
    def _groups(self) -> int:
        """The number of groups, each with its own U, s and Vᵀ."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt from U, s and V on every read (differentiable)."""
        left, values, right = self.triplets()
        return folded((left * values[:, None, :]) @ right, self._shape, **self.options)

    def _rebuilt(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return the dense weight where rebuilding it pays off for an input of this shape, or None."""
        if getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():
            return None  # an exported program must not depend on the size of its example
        left, _, right = self.triplets()
        groups, height, rank = left.shape
        if not _pays(self._rows(self, shape), math.prod(self._shape), groups, height, rank, right.shape[2]):
            return None
        with torch.autocast(self.scale.device.type, enabled=False):
            return self.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which the second stage adds."""
        bias: nn.Parameter | None = self.up.bias
        return bias

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with; where there are groups, that of each group."""
        return int(self.scale.shape[0]) // self._groups

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of U (groups, rows, rank), s (groups, rank) and Vᵀ (groups, rank, columns)."""
        groups, rank = self._groups, self.scale.shape[0] // self._groups
        up = self.up.weight.reshape(groups, -1, rank, self.up.weight[0, 0].numel())
        return (
            up.transpose(2, 3).flatten(1, 2),
            self.scale.view(groups, rank),
            self.down.weight.reshape(groups, rank, -1),
        )

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the weight, from Gram matrices of U and V (differentiable)."""
        left, values, right = self.triplets()
        return product_norm(left * values[:, None, :], right)

    @torch.no_grad()
    def truncated(self, rank: int) -> nn.Module:
        """Return the plain low-rank layer that keeps the `rank` largest `abs(s)`, with their roots in each factor.

        It is the best layer of that rank if U and V are orthonormal; `plain.from_dense(self.to_dense(), rank=rank)`
        is the best in any case.
        """
        check_rank(type(self).__name__, rank, self.rank)
        dense = take_over(self._hollow_dense("meta"), self.up).train(self.training)
        layer: Any = self.plain.like(dense, rank=rank, device=self.scale.device, **self.options)
        left, values, right = self.triplets()
        order = values.abs().argsort(dim=1, descending=True)[:, :rank]
        kept = values.gather(1, order)
        left = left.gather(2, order[:, None, :].expand(-1, left.shape[1], -1)) * kept.abs().sqrt()[:, None, :]
        right = right.gather(1, order[:, :, None].expand(-1, -1, right.shape[2]))
        right = right * (kept.sign() * kept.abs().sqrt())[:, :, None]
        _write(layer, left, right)
        copy_(layer.bias, self.bias)
        return layer  # type: ignore[no-any-return]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Take the SVD of a fresh dense weight, scaled to an output variance of 1/3 for white input."""
        if self.scale.is_meta:
            return
        groups, fan_in = self._groups, math.prod(self._shape[1:])
        left, _, right = self.triplets()
        shape = (groups, left.shape[1], right.shape[2])
        dense = torch.empty(shape, device="cpu").uniform_(-1, 1, generator=generator)
        parts = [_triplets_of(matrix, int(self.scale.shape[0]) // groups) for matrix in dense]
        u, s, vh = (torch.stack(list(part)) for part in zip(*parts, strict=True))
        target = self._shape[0] / 3
        self.write_triplets(u, s * math.sqrt(target / float(s.double().square().sum())), vh)
        fresh_bias_(self.bias, fan_in, generator)

    def to_dense(self) -> nn.Module:
        """Return the stock layer that computes the same function."""
        dense = take_over(self._hollow_dense(self.scale.device), self.up)
        fill(dense, self.weight, self.bias)
        return dense

    def write_triplets(self, left: Tensor, values: Tensor, right: Tensor) -> None:
        """Set U (groups, rows, rank), s (groups, rank) and Vᵀ (groups, rank, columns)."""
        copy_(self.scale, values.reshape(-1))
        _write(self, left, right)

    def _hollow_dense(self, device: Device) -> nn.Module:
        """Return the stock layer without values."""
        arguments = {**self._arguments(self), "device": "meta", "dtype": self.scale.dtype}
        dense = self.dense_type(**arguments)
        placed = dense if device == "meta" else place(dense, device)
        return laid_as(placed, [self.down.weight, self.up.weight])

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:  # noqa: ARG003 - the same for every layer
        """Return nothing: this form is for training, and costs more than the plain low-rank layer of the same rank."""
        return ()

    @classmethod
    def full_rank(cls, dense: nn.Module, **options: Any) -> Rank:
        """Return the rank (of each group) at which the dense layer is reproduced to rounding."""
        return _plain(cls).full_rank(dense, **options)

    @classmethod
    def rank_grid(cls, dense: nn.Module, *, multiple: int = 1, **options: Any) -> tuple[Rank, ...]:
        """Return candidate ranks, ascending, all with fewer parameters than the dense layer."""
        params = sum(parameter.numel() for parameter in dense.parameters())
        grid = _plain(cls).rank_grid(dense, multiple=multiple, **options)
        return tuple(rank for rank in grid if cls.cost(dense, (), rank=rank, **options).params < params)

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return the parameters, s included, and the multiply-adds of what `forward` does for each call."""
        checked = cls._checked(dense, rank, options)
        plain = _plain(cls).cost(dense, (), rank=checked, **options)
        macs = sum(cls._macs(dense, call, checked, options) for call in calls)
        return Cost(plain.params + checked * getattr(dense, "groups", 1), macs)

    @classmethod
    def _macs(cls, dense: Any, call: Call, rank: int, options: Options) -> int:
        groups, size = getattr(dense, "groups", 1), int(dense.weight.numel())
        stages = _plain(cls).cost(dense, (call,), rank=rank, **options).macs
        sides = unfolded(torch.empty_like(dense.weight, device="meta"), groups=groups, **options).shape[1:]
        if not _pays(cls._rows(dense, call.input), size, groups, sides[0], rank, sides[1]):
            return stages
        return groups * sides[0] * rank * sides[1] + cls._positions(dense, call) * size

    @staticmethod
    @abstractmethod
    def _rows(layer: Any, shape: tuple[int, ...]) -> int:
        """Return roughly how many output rows an input of this shape has, which decides how it is computed."""

    @staticmethod
    @abstractmethod
    def _positions(dense: Any, call: Call) -> int:
        """Return how often a call uses every weight of the dense layer."""

    @classmethod
    def errors(
        cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> tuple[float, ...]:
        """Return the relative error of the weight at each rank, from its singular values.

        In a metric, it is the error that the same SVD makes in the outputs: measured at a few ranks and interpolated.
        """
        checked = [cls._checked(dense, rank, options) for rank in ranks]
        if metric is None:
            return _plain(cls).errors(dense, checked, seed=seed, **options)

        def error_at(rank: Rank) -> float:
            return output_error(cls, dense, cls.from_dense(dense, rank=rank, **options).weight, metric)

        return measured_errors(checked, error_at, cls.full_rank(dense, **options))

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return the singular values of the unfolded weight: with several groups, the root mean square over them."""
        return _plain(cls).spectra(dense, **options)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        *,
        rank: Rank,
        seed: int = 0,  # noqa: ARG003 - exact
        metric: Metric | None = None,
        **options: Any,
    ) -> Self:
        """Take the SVD of the weight in float64; keeps options, dtype, device, mode and requires_grad.

        A metric only corrects the bias; U, s and V are those of the plain SVD.
        """
        group_metrics(cls, dense, metric)  # refuse a bad metric before any work
        layer = cls._hollow(dense, rank, None, options)
        matrices = unfolded(finite_weight(cls, dense), groups=getattr(dense, "groups", 1), **options)
        parts = [_triplets_of(matrix, cls._checked(dense, rank, options)) for matrix in matrices]
        layer.write_triplets(*(torch.stack(list(part)) for part in zip(*parts, strict=True)))
        copy_(layer.bias, corrected_bias(dense, layer.weight, metric))
        return layer

    @classmethod
    def _checked(cls, dense: nn.Module, rank: Rank, options: Options) -> int:
        """Return the rank as an int, or raise a `LayerError` where the layer cannot have it."""
        checked: Any = check_rank(cls.__name__, rank, cls.full_rank(dense, **options))
        return int(checked)


def _pays(rows: int, size: int, groups: int, left: int, rank: int, right: int) -> bool:  # noqa: PLR0913
    """Tell whether rebuilding the weight and applying it takes fewer multiply-adds than the two stages."""
    stages = groups * rank * (left + right)
    return rows * (stages - size) > groups * left * rank * right


def _plain(cls: type[SVDForm]) -> type[FactorisedLayer]:
    plain: type[FactorisedLayer] = cls.plain
    return plain


def _triplets_of(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and Vᵀ; vectors are orthonormal even where s is 0, so that such a component can still grow."""
    factors = svd(matrix, rank, method="exact")
    return factors.u, factors.s, factors.vh


def _write(layer: Any, left: Tensor, right: Tensor) -> None:
    """Write matrices (groups, rows, rank) and (groups, rank, columns) into the stages of a layer."""
    groups, rank = right.shape[:2]
    copy_(layer.down.weight, right.reshape(layer.down.weight.shape))
    rows = left.reshape(groups, layer.up.weight.shape[0] // groups, -1, rank)  # groups, out, kernel, rank
    copy_(layer.up.weight, rows.transpose(2, 3).reshape(layer.up.weight.shape))


@final
class SVDLinear(SVDForm):
    """A linear layer in SVD form: `weight = up.weight @ diag(scale) @ down.weight`.

    The arguments are those of `nn.Linear`, then `rank`, at most min(in, out); fresh values are the SVD of a fresh
    dense weight. This form is for training: `truncated` turns it into a plain `LowRankLinear`.

    Raises:
        LayerError: a rank out of range.

    Reference:
        Yang et al. 2020, section 3.1.

    Example:
        >>> layer = SVDLinear.from_dense(nn.Linear(6, 4), rank=4)
        >>> layer.scale.shape, layer.truncated(2).rank
        (torch.Size([4]), 2)
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Linear
    plain: ClassVar[Any] = LowRankLinear

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
        plain = LowRankLinear(in_features, out_features, bias, "meta", dtype, rank=rank)
        self._take_stages(plain, (out_features, in_features), device)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Apply diag(s) Vᵀ and then U, or their product."""
        weight = self._rebuilt(input.shape)
        if weight is not None:
            return F.linear(input, weight, self.bias)  # …, out
        hidden = F.linear(input, self.down.weight * self.scale[:, None])  # …, rank
        output: Tensor = self.up(hidden)  # …, out
        return output

    @property
    def options(self) -> Options:
        """Empty: the rank is all there is to choose."""
        return {}

    @property
    def _groups(self) -> int:
        return 1

    @staticmethod
    def _rows(layer: Any, shape: tuple[int, ...]) -> int:  # noqa: ARG004
        return math.prod(shape[:-1])

    @staticmethod
    def _positions(dense: Any, call: Call) -> int:  # noqa: ARG004
        return math.prod(call.input[:-1])

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        features = {"in_features": dense.in_features, "out_features": dense.out_features}
        return {**features, "bias": dense.bias is not None}
