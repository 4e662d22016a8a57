"""What every factorised layer class offers: the contract between layers and everything above them.

A factorised layer is an `nn.Module` that computes what one dense layer computes, from factors.
Its class is final and also knows, without being built, what it would cost and how far it would be
from the dense layer, so that planning needs no knowledge of any method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from rankfold._common import Rank as Rank

if TYPE_CHECKING:
    from typing_extensions import Self

Options: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """Shapes of one call of a layer, batch included: what its MACs depend on."""

    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Parameters of a layer (bias included) and multiply-adds summed over its calls."""

    params: int
    macs: int


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values (descending, float64) of one unfolding of a weight, and its shape."""

    values: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Metric:
    """What is known of the inputs of a layer: errors in it are errors of the layer's outputs, not of its weight.

    The squared error of a weight W' in it is `sum_g trace(D_g C_g D_g^T)` with `D = W - W'` as the matrix
    `weight.flatten(1)` of each group g. C is the covariance where the layer has a bias, since the bias then takes up
    what the change does to the mean, and the second moment where it has none.

    Attributes:
        second: (groups, n, n), float64: the mean of `x x^T` over the inputs x of a linear layer, or over the patches
            of a convolution, n = in/groups * kernel, in the order of `weight.flatten(1)`; groups is 1 but for grouped
            convolutions.
        mean: (groups, n), float64: the mean of x.
        output_weights: (out,), float64, or None: weights of the squared errors of the outputs, such as the mean squared
            gradients of the loss in them.
    """

    second: Tensor
    mean: Tensor
    output_weights: Tensor | None = None


@dataclass(frozen=True)
class Stages:
    """That a layer is two stages, its submodules `down` and then `up`, whose product is its weight.

    The rank is one int, the width between the stages. Of each group, one unfolding of the weight as a matrix is the
    product of the weights of `up` and `down`, and every matrix of the rank is such a product: `from_dense` of a weight
    of that rank reproduces it. From this follow, without a line of the class's own: steps of the rank for a budget on
    latency; reduced-rank regression in a recalibration, or of `up` alone where memory is short; and, for a class that
    factorises `nn.Embedding`, a head that is tied to it and shares both stages.

    Attributes:
        of_matrix: the options with which that unfolding is `weight.flatten(1)`, such as `{"split": "channel"}`; a layer
            with another value of one of them unfolds its kernel otherwise.
        plain: whether the layer computes `up(down(input))` and nothing else, from two stock layers: `down` without a
            bias, `up` with the layer's bias.

    Example:
        >>> stages = Stages({"split": "channel"})
        >>> stages.is_matrix({"split": "channel"}), stages.is_matrix({"split": "spatial"})
        (True, False)
    """

    of_matrix: Options = field(default_factory=dict)
    plain: bool = True

    def is_matrix(self, options: Options) -> bool:
        """Tell whether the product of the stages of a layer with these options is `weight.flatten(1)`."""
        return all(options.get(name, value) == value for name, value in self.of_matrix.items())


@runtime_checkable
class FactorisedLayer(Protocol):
    """The contract; `dense` is always a stock layer of type `dense_type`.

    `options` are the keyword arguments beside `rank` that the constructor takes (`split`,
    `separable`, `in_shape`, …); each class names its own, and an unknown one is a `TypeError`. A rank or an option that
    does not fit is a `ValueError`, as every `RankfoldError` is. Besides the members below a layer has the attributes
    of its dense twin (`in_features`, `stride`, …) and, where that has one, its `bias`: a parameter of this name, of its
    own or of a stage. `rankfold.testing.check_layer` tries all of it.

    Attributes:
        method: the name of the method in plans and files, the same for all types of dense layers that it factorises.
        dense_type: the type of the dense layer, a stock one of `rankfold.layers.DENSE_TYPES`.
        stages: what is known of a layer that is two stages, `down` and `up`; None for any other form.
    """

    method: ClassVar[str]
    dense_type: ClassVar[type[nn.Module]]
    stages: ClassVar[Stages | None]

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with."""

    @property
    def options(self) -> Options:
        """The options this layer was built with: `like(dense, rank=rank, **options)` is its twin."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt from the factors on every read (differentiable)."""

    def to_dense(self) -> nn.Module:
        """Return the stock layer that computes the same function."""

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the weight, from the factors, without rebuilding it."""

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:
        """Return the option sets worth planning for this layer; empty where there is none."""

    @classmethod
    def full_rank(cls, dense: nn.Module, **options: Any) -> Rank:
        """Return the rank at which the dense layer is reproduced to rounding."""

    @classmethod
    def rank_grid(cls, dense: nn.Module, *, multiple: int = 1, **options: Any) -> tuple[Rank, ...]:
        """Return candidate ranks, ascending in cost, rounded to `multiple`, with fewer parameters than dense."""

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return the cost of the factorised layer, without building it."""

    @classmethod
    def errors(
        cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> tuple[float, ...]:
        """Return the relative error at each rank, from one factorisation: Frobenius of the weight, or in a metric."""

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return one spectrum per entry of the rank, in its order; empty where a method has none."""

    @classmethod
    def from_dense(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> Self:
        """Decompose the weight of `dense`; keeps its options, dtype, device, mode and requires_grad.

        In a metric the error of the outputs is made small instead of that of the weight, and the bias, where there is
        one, takes up the mean: `b' = b + (W - W') E[x]`.
        """

    @classmethod
    def like(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, device: torch.device | str | None = None, **options: Any
    ) -> Self:
        """Return a layer with the shape and options of `dense` and a fresh initialisation.

        The output variance at initialisation is that of a fresh dense layer. `dense` may be on the meta
        device; with `device="meta"` nothing is allocated.
        """
