"""Pufferfish: dense warm-up, then low-rank layers at a fixed fraction of the full rank."""

from __future__ import annotations

import math
from typing import final

from torch import nn

from rankfold._common import real, whole
from rankfold.errors import LayerError
from rankfold.train.lowrank._dense_method import DenseMethod
from rankfold.train.lowrank._targets import Patterns


@final
class Pufferfish(DenseMethod):
    """Train a dense model for a few epochs, then factorise all but its first and last layers.

    Nothing is added to the loss. `finished` tells when the warm-up is over; `prune()` then returns the low-rank model
    to continue training with, each weight being U sqrt(S) times sqrt(S) Vᵀ.

    Args:
        model: a dense model; it is trained in place.
        warmup: number of epochs of dense training.
        share: rank of each layer as a fraction of its full rank, 0 < x <= 1.
        first: how many of the first layers stay dense.
        last: how many of the last layers stay dense.
        split: how kernels are split, "spatial" or "channel".
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value is out of range.

    Reference:
        Wang, Agarwal and Papailiopoulos 2021, Pufferfish: communication-efficient models at no extra cost.

    Example:
        >>> run = Pufferfish(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), warmup=1)
        >>> run.epoch()
        >>> small, _ = run.prune()
        >>> run.finished, small[1].rank, type(small[0]).__name__
        (True, 4, 'Linear')
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        warmup: int = 5,
        share: float = 0.25,
        first: int = 1,
        last: int = 1,
        split: str = "spatial",
        include: Patterns = (),
        exclude: Patterns = (),
    ) -> None:
        self.warmup = whole("warmup", warmup)
        self.share = real("share", share, most=1, ends="(]")
        super().__init__(model, split, include, exclude)
        first, last = whole("first", first, 0), whole("last", last, 0)
        names = list(self.options)[first : len(self.options) - last]
        if not names:
            raise LayerError(
                f"of {len(self.options)} layers the first {first} and the last {last} stay dense: none is left"
            )
        self.options = {name: self.options[name] for name in names}
        self.layers = {name: self.layers[name] for name in names}

    @property
    def finished(self) -> bool:
        """Whether the warm-up is over."""
        return self.epochs >= self.warmup

    def _own_ranks(self) -> dict[str, int]:
        """Return the same fraction of each layer's full rank, rounded up."""
        return {name: max(1, math.ceil(self.share * self.full_rank(name))) for name in self.layers}
