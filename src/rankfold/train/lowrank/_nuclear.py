"""Nuclear-norm training: proximal steps that shrink the singular values of the weights, the small ones to zero."""

from __future__ import annotations

from typing import final

import torch
from torch import nn

from rankfold._common import real, whole
from rankfold.errors import RankfoldError
from rankfold.train.lowrank._dense_method import DenseMethod
from rankfold.train.lowrank._targets import Patterns, svd_of

NOTHING = 1e-6  # of the largest singular value: what soft thresholding sets to zero is zero up to rounding


@final
class NuclearNorm(DenseMethod):
    """Train a dense model, applying the proximal operator of λ ||W||_* every few optimiser steps.

    After every m steps of size η each singular value becomes max(s - m η λ, 0), which gives the minimiser of
    ||X - W||² / 2 + m η λ ||X||_*. A BatchNorm after a layer undoes its scale, so all of its singular values may
    shrink together: watch the ranks, not the norm.

    Args:
        model: a dense model; it is trained in place.
        strength: λ.
        lr: the step size η, or the optimiser, to use the learning rate of its first group.
        split: how kernels are split, "spatial" or "channel".
        every: m, the number of optimiser steps between proximal steps; each of these takes an SVD of every weight.
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value is out of range.

    Reference:
        Cai, Candès and Shen 2010, A singular value thresholding algorithm for matrix completion, theorem 2.1.

    Example:
        >>> run = NuclearNorm(nn.Sequential(nn.Linear(8, 8)), strength=0.2, lr=1.0, every=1)
        >>> before = run.spectrum()["0"]
        >>> run.step()
        >>> torch.allclose(run.spectrum()["0"], (before - 0.2).clamp_min(0), atol=1e-6)
        True
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        strength: float = 1e-2,
        lr: float | torch.optim.Optimizer = 1e-3,
        split: str = "spatial",
        every: int = 20,
        include: Patterns = (),
        exclude: Patterns = (),
    ) -> None:
        self.strength = real("strength", strength)
        self.every = whole("every", every)
        if not isinstance(lr, torch.optim.Optimizer):
            real("lr", lr)
        self.lr = lr
        super().__init__(model, split, include, exclude)

    def _after_step(self) -> None:
        if self.steps % self.every:
            return
        rate = self.lr.param_groups[0]["lr"] if isinstance(self.lr, torch.optim.Optimizer) else self.lr
        threshold = self.every * float(rate) * self.strength
        for name in self.layers:
            u, s, vh = svd_of(self.matrices(name))
            shrunk = (s - threshold).clamp_min(0)
            if not bool(shrunk.any()):
                raise RankfoldError(
                    f"the proximal step would set all of layer {name!r} to zero: its largest singular value is "
                    f"{float(s.max()):.3g}, the threshold {threshold:.3g}; lower strength, lr or every"
                )
            self.write(name, (u * shrunk[:, None, :]) @ vh)

    def _own_ranks(self) -> dict[str, int]:
        """Return the number of nonzero singular values of each layer."""
        return {name: max(1, int((values > NOTHING * values[0]).sum())) for name, values in self.spectrum().items()}
