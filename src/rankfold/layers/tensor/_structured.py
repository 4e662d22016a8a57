"""What linear layers over folded sides share: a matrix whose rows and columns each have two or more modes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.decompose import balanced_shape
from rankfold.errors import LayerError
from rankfold.layers._build import (
    Device,
    check_type,
    copy_,
    fill,
    finite_weight,
    fresh_bias_,
    fresh_uniform_,
    place,
    rescale_,
)
from rankfold.layers._contract import Call, Cost, Metric, Options, Rank
from rankfold.layers._metric import corrected_bias, group_metrics, measured_errors, output_error
from rankfold.layers._ranks import below
from rankfold.layers._twin import TwinLayer
from rankfold.layers.tensor._tt_chain import PADDING, TYPICAL_MODE, TTForm, make_form

if TYPE_CHECKING:
    from typing_extensions import Self

Box: TypeAlias = tuple[slice, ...]


class StructuredLinear(TwinLayer):
    """A linear layer whose weight is given by cores over folded sides; the final classes say how.

    `out_shape` and `in_shape` are row-major dims of the outputs and the inputs. Where their product exceeds the size,
    the input is padded with zeros and the output cut.
    """

    method: ClassVar[str]
    dense_type: ClassVar[type[nn.Module]] = nn.Linear
    orders: ClassVar[tuple[int, ...]]
    """Numbers of dims worth planning; if there is only one, it is the only one allowed."""
    cores: nn.ParameterList

    def __init__(  # noqa: PLR0913 (the signature of nn.Linear)
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._form = self._formed((out_features, in_features), in_shape, out_shape)
        self._rank = tuple(rank) if isinstance(rank, (tuple, list)) else rank
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self._shapes(self._form, rank)
        )
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._padding = math.prod(self._form.in_shape) - in_features
        self._prepare()
        self.reset_parameters()

    @staticmethod
    @abstractmethod
    def _shapes(form: TTForm, rank: Rank) -> list[tuple[int, ...]]:
        """Return the shapes of the cores, or raise a `LayerError` for a rank that does not fit."""

    @abstractmethod
    def _prepare(self) -> None:
        """Prepare what the forward pass needs."""

    @abstractmethod
    def _stages(self) -> list[Tensor]:
        """Return a view of every core as (outputs, fan-in)."""

    @abstractmethod
    def _multiply(self, rows: Tensor) -> Tensor:
        """Return the padded weight times padded rows: (rows, in) to (rows, out)."""

    @abstractmethod
    def _matrix(self) -> Tensor:
        """Return the padded weight."""

    @abstractmethod
    def _squared_norm(self, rows: Box, columns: Box) -> Tensor:
        """Return the squared norm of a box of the folded weight, from the cores."""

    @classmethod
    @abstractmethod
    def _factors(cls, form: TTForm, matrix: Tensor, rank: Rank, seed: int) -> Sequence[Tensor]:
        """Return the cores of a dense weight."""

    @staticmethod
    @abstractmethod
    def _macs(form: TTForm, rank: Rank, rows: int) -> int:
        """Return the multiply-adds for a number of rows."""

    @staticmethod
    @abstractmethod
    def _full(form: TTForm) -> int:
        """Return the rank that cuts nothing."""

    @staticmethod
    @abstractmethod
    def _candidates(form: TTForm, multiple: int) -> Sequence[Rank]:
        """Return ranks worth planning, in any order."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh `nn.Linear`, 1/3 for white input, and its bias."""
        fresh_uniform_(self._stages(), 1 / 3, generator)
        rescale_(list(self.cores), self.squared_norm().detach(), self.out_features / 3)
        fresh_bias_(self.bias, self.in_features, generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Apply the cores to the last axis of the input."""
        rows = input.reshape(-1, self.in_features)
        if self._padding:
            rows = functional.pad(rows, (0, self._padding))
        output = self._multiply(rows)[:, : self.out_features]  # rows, out
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)  # autocast does not narrow it
        return output.reshape(*input.shape[:-1], self.out_features)

    def fan_ins(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield every core with its fan-in: how many values one of its outputs adds up."""
        for core, stage in zip(self.cores, self._stages(), strict=True):
            yield core, stage[0].numel()

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with."""
        return self._rank

    @property
    def options(self) -> Options:
        """The options besides the rank: `like(dense, rank=rank, **options)` is the twin of this layer."""
        return self._form.options

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), rebuilt from the cores on every read (differentiable)."""
        return self._matrix()[: self.out_features, : self.in_features]

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the weight, from the cores, without rebuilding it (differentiable)."""
        return sum_boxes(self._squared_norm, self._form)

    def to_dense(self) -> nn.Linear:
        """Return the `nn.Linear` that computes the same function."""
        core = self.cores[0]
        dense = nn.Linear(**self._arguments(self), device="meta", dtype=core.dtype)
        dense.weight.requires_grad_(core.requires_grad)
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        dense = place(dense, core.device)
        fill(dense, self.weight, self.bias)
        return dense.train(self.training)

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:
        """Return the balanced shapes with little padding for which some rank has fewer parameters than dense."""
        form = cls._form_of(dense)
        found: list[Options] = []
        for order in cls.orders:
            out_shape, in_shape = (balanced_shape(size, order) for size in (form.out_size, form.in_size))
            padded = math.prod(out_shape) * math.prod(in_shape) / (form.out_size * form.in_size)
            if min(*out_shape, *in_shape) > 1 and padded <= PADDING:
                found.append({"in_shape": in_shape, "out_shape": out_shape})
        return tuple(options for options in found if cls.rank_grid(dense, **options))

    @classmethod
    def full_rank(cls, dense: nn.Module, **options: Any) -> Rank:
        """Return the rank at which the dense layer is reproduced to rounding."""
        return cls._full(cls._form_of(dense, **options))

    @classmethod
    def rank_grid(cls, dense: nn.Module, *, multiple: int = 1, **options: Any) -> tuple[Rank, ...]:
        """Return candidate ranks, ascending in cost, all with fewer parameters than the dense layer."""
        form = cls._form_of(dense, **options)
        ranks = cls._candidates(form, multiple)
        return below(form.out_size * form.in_size, ranks, lambda rank: cls._params(form, rank))

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return the parameters, bias included, and the multiply-adds of every call."""
        form = cls._form_of(dense, **options)
        params = cls._params(form, rank) + (0 if dense.bias is None else form.out_size)
        return Cost(params, sum(cls._macs(form, rank, math.prod(call.input[:-1])) for call in calls))

    @classmethod
    def errors(
        cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> tuple[float, ...]:
        """Return the relative error of the weight at each rank; errors on padding do not count.

        In a metric, it is the error that the same cores make in the outputs: measured at a few ranks and interpolated.
        """
        form = cls._form_of(dense, **options)
        for rank in ranks:
            cls._shapes(form, rank)
        if metric is None:
            return cls._weight_errors(form, finite_weight_of(cls, dense), ranks, seed)

        def error_at(rank: Rank) -> float:
            small = cls.from_dense(dense, rank=rank, seed=seed, **options)
            return output_error(cls, dense, small.weight, metric)

        return measured_errors(ranks, error_at, cls._full(form))

    @classmethod
    @abstractmethod
    def _weight_errors(cls, form: TTForm, matrix: Tensor, ranks: Sequence[Rank], seed: int) -> tuple[float, ...]:
        """Return the relative error of the weight at each rank; the ranks have been checked."""

    @classmethod
    def from_dense(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> Self:
        """Decompose the weight in float64; keeps options, dtype, device, mode and requires_grad.

        A metric only corrects the bias; the cores are those of the plain decomposition.
        """
        form, matrix = cls._form_of(dense, **options), finite_weight_of(cls, dense)
        group_metrics(cls, dense, metric)  # refuse a bad metric before any work
        layer = cls._hollow(dense, rank, None, options)
        for core, value in zip(layer.cores, cls._factors(form, matrix, rank, seed), strict=True):
            copy_(core, value)
        copy_(layer.bias, corrected_bias(dense, layer.weight, metric))
        return layer

    @classmethod
    def _params(cls, form: TTForm, rank: Rank) -> int:
        return sum(map(math.prod, cls._shapes(form, rank)))

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        features = {"in_features": dense.in_features, "out_features": dense.out_features}
        return {**features, "bias": dense.bias is not None}

    @classmethod
    def _form_of(
        cls, dense: Any, *, in_shape: Sequence[int] | None = None, out_shape: Sequence[int] | None = None
    ) -> TTForm:
        check_type(cls, dense, nn.Linear)
        return cls._formed((dense.out_features, dense.in_features), in_shape, out_shape)

    @classmethod
    def _formed(cls, sizes: tuple[int, int], in_shape: Sequence[int] | None, out_shape: Sequence[int] | None) -> TTForm:
        """Return the folded sides, by default balanced, with modes near `TYPICAL_MODE` if the order is free."""
        if in_shape is None and out_shape is None:
            usual = round(math.log(max(sizes), TYPICAL_MODE))
            in_shape = balanced_shape(sizes[1], min(max(usual, cls.orders[0]), cls.orders[-1]))
        form = make_form(cls.__name__, sizes, in_shape, out_shape)
        if len(cls.orders) == 1 and len(form.in_shape) != cls.orders[0]:
            raise LayerError(
                f"{cls.__name__}: in_shape={form.in_shape} and out_shape={form.out_shape} must be two dims each"
            )
        return form


def finite_weight_of(owner: type[StructuredLinear], dense: nn.Module) -> Tensor:
    """Return the weight in float64, or raise a `LayerError` if it cannot be decomposed."""
    check_type(owner, dense, nn.Linear)
    return finite_weight(owner, dense)


def boxes(size: int, shape: Sequence[int]) -> Iterator[Box]:
    """Yield disjoint boxes of digits that make up the indices below `size`: a single one without padding.

    An index is below `size` if its digits agree with those of `size` up to some place and are smaller there.
    """
    if math.prod(shape) == size:
        yield tuple(slice(0, dim) for dim in shape)
        return
    digits = [size // math.prod(shape[k + 1 :]) % dim for k, dim in enumerate(shape)]
    for k, digit in enumerate(digits):
        if digit:
            agreeing = (slice(same, same + 1) for same in digits[:k])
            yield (*agreeing, slice(0, digit), *(slice(0, dim) for dim in shape[k + 1 :]))


def sum_boxes(part: Callable[[Box, Box], Tensor], form: TTForm) -> Tensor:
    """Return the sum of `part(rows, columns)` over the boxes that make up the weight."""
    terms = [
        part(rows, columns)
        for rows in boxes(form.out_size, form.out_shape)
        for columns in boxes(form.in_size, form.in_shape)
    ]
    return torch.stack(terms).sum(0)


def widened(core: Tensor) -> Tensor:
    """Return a core in at least single precision, so that the norm of a half-precision core does not overflow."""
    return core if core.dtype == torch.float64 else core.float()
