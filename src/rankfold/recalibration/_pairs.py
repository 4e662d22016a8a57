"""Pairs of what a layer is given and what it should return, summed up to second moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.stats import add_product


@dataclass(eq=False)
class Pairs:
    """Sums over pairs of an input x and a wanted output y, per group, in float64.

    Attributes:
        count: number of pairs.
        xx: (groups, n, n), sum of `x x^T`.
        yx: (groups, out, n), sum of `y x^T`.
        yy: (groups, out), sum of the squares of y.
        x: (groups, n), sum of x.
        y: (groups, out), sum of y.
    """

    count: int
    xx: Tensor
    yx: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def empty(cls, groups: int, n: int, out: int, device: torch.device) -> Pairs:
        """Return the sums over no pairs, for `out` outputs of each group."""

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(groups, *sizes, dtype=torch.float64, device=device)

        return cls(0, zeros(n, n), zeros(out, n), zeros(out), zeros(n), zeros(out))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add pairs of inputs (groups, rows, n) and targets (rows, groups · out)."""
        wanted = targets.to(inputs).reshape(len(targets), len(inputs), targets.shape[1] // len(inputs)).movedim(1, 0)
        self.count += len(targets)
        add_product(self.xx, inputs, inputs)
        add_product(self.yx, wanted, inputs)
        self.yy += wanted.double().square().sum(1)
        self.x += inputs.sum(1, dtype=torch.float64)
        self.y += wanted.sum(1, dtype=torch.float64)

    def __add__(self, other: Pairs) -> Pairs:
        """Return the sums over the pairs of both."""
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Pairs(*(one + another for one, another in both))

    def loss(self, weight: Tensor, bias: Tensor | None, output_weights: Tensor | None = None) -> float:
        """Return the mean squared error of the outputs of a weight (groups, out, n) and a bias (groups, out).

        `output_weights` is (groups, out): weights of the outputs.
        """
        squares = self.yy - 2 * (weight * self.yx).sum(2) + ((weight @ self.xx) * weight).sum(2)
        if bias is not None:
            squares = squares + bias * (self.count * bias + 2 * (weight @ self.x[..., None])[..., 0] - 2 * self.y)
        total = squares.sum() if output_weights is None else (squares * output_weights).sum()
        return max(float(total), 0.0) / max(self.count, 1)

    def bias(self, weight: Tensor) -> Tensor:
        """Return the bias (groups, out) that is best beside a weight: `E[y] - W E[x]`."""
        return (self.y - (weight @ self.x[..., None])[..., 0]) / self.count

    def means(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the means of `x x^T` (groups, n, n) and of `y x^T` (groups, out, n); covariances if `centred`."""
        xx, yx = self.xx / self.count, self.yx / self.count
        if centred:
            x = self.x[:, None] / self.count
            xx = xx - x.mT @ x
            yx = yx - (self.y / self.count)[:, :, None] @ x
        return xx, yx
