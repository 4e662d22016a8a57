"""What factorised layers with a dense twin share: how one is modelled on a dense layer, and its repr."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rankfold.layers._build import Device, check_type, hollow, named, seeded
from rankfold.layers._contract import Options, Rank, Stages

if TYPE_CHECKING:
    from typing_extensions import Self


class TwinLayer(nn.Module):
    """A layer modelled on a dense one; the subclasses say with which arguments and which values."""

    dense_type: ClassVar[type[nn.Module]]
    stages: ClassVar[Stages | None] = None

    @property
    @abstractmethod
    def rank(self) -> Rank:
        """The rank this layer was built with."""

    @property
    @abstractmethod
    def options(self) -> Options:
        """The options besides the rank: `like(dense, rank=rank, **options)` is the twin of this layer."""

    @staticmethod
    @abstractmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        """Return the constructor's arguments of a dense or factorised layer, without device and dtype."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh dense layer."""

    def extra_repr(self) -> str:
        """Return what the dense twin prints, then the rank and the options."""
        return f"{self.dense_type.extra_repr(self)}, {named(self.rank, dict(self.options))}"

    @classmethod
    def like(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, device: torch.device | str | None = None, **options: Any
    ) -> Self:
        """Return a layer with the shape and options of `dense` and fresh values."""
        layer = cls._hollow(dense, rank, device, options)
        layer.reset_parameters(seeded(seed))
        return layer

    @classmethod
    def _hollow(cls, dense: nn.Module, rank: Rank, device: Device, options: Mapping[str, Any]) -> Self:
        """Return the empty layer, on the device of `dense` unless another is given."""
        check_type(cls, dense, cls.dense_type)
        return hollow(cls, dense, {**cls._arguments(dense), "rank": rank, **options}, device)
