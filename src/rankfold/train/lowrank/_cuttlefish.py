"""Cuttlefish: dense warm-up until the stable ranks settle, then low-rank layers at ranks derived from them."""

from __future__ import annotations

import math
from typing import final

from torch import nn

from rankfold._common import real, whole
from rankfold.ranks import stable_rank
from rankfold.train.lowrank._dense_method import DenseMethod
from rankfold.train.lowrank._method import State
from rankfold.train.lowrank._targets import Patterns


@final
class Cuttlefish(DenseMethod):
    """Train a dense model until its stable ranks stop changing, then factorise it at ranks derived from them.

    The stable rank `||W||_F² / ||W||_2²` of every layer is computed after each epoch. From epoch `earliest` on,
    `finished` is true once the smoothed stable rank of every layer has changed by at most `tolerance` per epoch, on
    average over the last `window` epochs. The rank of a layer is ceil(c * stable rank), where c is its full rank
    divided by its stable rank before training: a layer whose spectrum decays no faster than at the start keeps its
    full rank and stays dense. The paper also measures which layers are worth factorising; use `exclude` for that.

    Args:
        model: a dense model; it is trained in place.
        earliest: first epoch after which the model may be factorised.
        window: number of epochs over which the stable ranks must be flat.
        smoothing: span of the exponential moving average, in epochs.
        tolerance: largest mean change of a stable rank per epoch that counts as flat.
        split: how kernels are split, "spatial" or "channel".
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value is out of range.

    Reference:
        Wang et al. 2023, Cuttlefish: low-rank model training without all the tuning.

    Example:
        >>> run = Cuttlefish(nn.Sequential(nn.Linear(16, 16)), earliest=2, window=1)
        >>> run.epoch(), run.finished
        (None, False)
        >>> run.epoch(), run.finished
        (None, True)
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        earliest: int = 15,
        window: int = 11,
        smoothing: int = 15,
        tolerance: float = 0.1,
        split: str = "spatial",
        include: Patterns = (),
        exclude: Patterns = (),
    ) -> None:
        self.earliest = whole("earliest", earliest)
        self.window = whole("window", window)
        self.smoothing = whole("smoothing", smoothing)
        self.tolerance = real("tolerance", tolerance)
        super().__init__(model, split, include, exclude)
        self.stable_ranks = {name: [rank] for name, rank in self._stable().items()}

    @property
    def finished(self) -> bool:
        """Whether the stable rank of every layer has settled."""
        enough = self.epochs >= max(self.earliest, self.window)
        return enough and all(self._change(curve) <= self.tolerance for curve in self.stable_ranks.values())

    def _stable(self) -> dict[str, float]:
        return {name: stable_rank(values) for name, values in self.spectrum().items()}

    def _change(self, curve: list[float]) -> float:
        """Return the mean absolute change per epoch at the end of the smoothed curve."""
        keep, smooth = 2 / (self.smoothing + 1), [curve[0]]
        for value in curve[1:]:
            smooth.append(keep * value + (1 - keep) * smooth[-1])
        recent = smooth[-self.window - 1 :]
        return sum(abs(b - a) for a, b in zip(recent, recent[1:], strict=False)) / self.window

    def _after_epoch(self) -> None:
        for name, rank in self._stable().items():
            self.stable_ranks[name].append(rank)

    def _own_ranks(self) -> dict[str, int]:
        """Return the scaled stable ranks."""
        ranks = {}
        for name, curve in self.stable_ranks.items():
            full = self.full_rank(name)
            # rounded first, so that a rank that has not changed is not raised by one
            ranks[name] = min(full, max(1, math.ceil(round(curve[-1] * full / curve[0], 6))))
        return ranks

    def _state(self) -> State:
        return {"stable_ranks": {name: list(curve) for name, curve in self.stable_ranks.items()}}

    def _load_state(self, state: State) -> None:
        curves = state.pop("stable_ranks")
        if set(curves) != set(self.layers):
            raise KeyError("layers that this model does not have")
        self.stable_ranks = {name: list(map(float, curve)) for name, curve in curves.items()}
        super()._load_state(state)
