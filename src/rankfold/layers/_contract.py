"""What every factorised layer class offers: the contract between layers and everything above them.

A factorised layer is an `nn.Module` that computes what one dense layer computes, from factors.
Its class is final and also knows, without being built, what it would cost and how far it would be
from the dense layer, so that planning needs no knowledge of any method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Rank: TypeAlias = int | tuple[int, ...]
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


@runtime_checkable
class FactorisedLayer(Protocol):
    """The contract; `dense` is always a stock layer of type `dense_type`.

    `options` are the keyword arguments beside `rank` that the constructor takes (`split`,
    `separable`, `in_shape`, …); each class names its own, and an unknown one is a `TypeError`.
    """

    method: ClassVar[str]
    dense_type: ClassVar[type[nn.Module]]

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
    def errors(cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, **options: Any) -> tuple[float, ...]:
        """Return the relative Frobenius error of the weight at each rank, from one factorisation."""

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return one spectrum per entry of the rank, in its order; empty where a method has none."""

    @classmethod
    def from_dense(cls, dense: nn.Module, *, rank: Rank, seed: int = 0, **options: Any) -> Self:
        """Decompose the weight of `dense`; keeps its options, dtype, device, mode and requires_grad."""

    @classmethod
    def like(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, device: torch.device | str | None = None, **options: Any
    ) -> Self:
        """Return a layer with the shape and options of `dense` and a fresh initialisation.

        The output variance at initialisation is that of a fresh dense layer. `dense` may be on the meta
        device; with `device="meta"` nothing is allocated.
        """
