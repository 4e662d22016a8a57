"""Dynamical low-rank training: steps on the manifold of low-rank weights, with a rank that can grow and shrink."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from rankfold._common import real
from rankfold.ranks import energy as rank_of_energy
from rankfold.train.lowrank._dense_method import DenseMethod, named, taken
from rankfold.train.lowrank._method import State
from rankfold.train.lowrank._targets import Patterns, mean_spectrum, svd_of

Factors = tuple[Tensor, Tensor, Tensor]  # U (groups, rows, r), S (groups, r, r), Vᵀ (groups, r, columns)


@final
class DLRT(DenseMethod):
    """Keep the weights at low rank from the first step on, alternating between steps of the bases and steps of S.

    A weight is W = U S Vᵀ. Two optimiser steps D and D' make one step on the manifold. The first moves the bases:

        K = U S + D V,  L = V Sᵀ + Dᵀ U,  U^ = orth [K | U],  V^ = orth [L | V],  S^ = U^ᵀ W V^,

    and leaves W unchanged; the second moves the core to S^ + U^ᵀ D' V^, of twice the rank, and truncates it to the
    smallest r with sqrt(sum_{i>r} s_i²) <= tolerance * ||s||. With plain gradient descent these are the K, L and S
    steps of the paper, the last one on its own batch. Any optimiser works, and small singular values do no harm.
    The forward and backward passes are those of the dense model; the savings come with `prune`.

    Args:
        model: a dense model; it is trained in place, and truncated to low rank right away.
        tolerance: relative error allowed in a truncation, 0 <= x < 1.
        split: how kernels are split, "spatial" or "channel".
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value is out of range.

    Reference:
        Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco 2022, Low-rank lottery tickets, algorithm 1.

    Example:
        >>> run = DLRT(nn.Sequential(nn.Linear(8, 8)), tolerance=0.3)
        >>> small, _ = run.prune()
        >>> torch.allclose(small(torch.ones(1, 8)), run.model(torch.ones(1, 8)), atol=1e-5)
        True
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        tolerance: float = 0.1,
        split: str = "spatial",
        include: Patterns = (),
        exclude: Patterns = (),
    ) -> None:
        self.tolerance = real("tolerance", tolerance, most=1)
        super().__init__(model, split, include, exclude)
        self._factors = {name: self._truncated(*svd_of(self.matrices(name))) for name in self.layers}
        self._augmented = False
        self._write_all()

    def _truncated(self, u: Tensor, s: Tensor, vh: Tensor) -> Factors:
        rank = rank_of_energy(mean_spectrum(s), 1 - self.tolerance**2)
        return u[:, :, :rank], torch.diag_embed(s[:, :rank]), vh[:, :rank]

    def _write_all(self) -> None:
        for name, (u, s, vh) in self._factors.items():
            self.write(name, u @ s @ vh)

    def _after_step(self) -> None:
        move = self._move_core if self._augmented else self._move_bases
        self._factors = {name: move(self.matrices(name), *factors) for name, factors in self._factors.items()}
        self._augmented = not self._augmented
        self._write_all()

    def _move_bases(self, moved: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Factors:
        """Take the K step and the L step, and return W in the bases that span both."""
        step = moved - u @ s @ vh
        rows = _basis(u @ s + step @ vh.mT, u)
        columns = _basis(vh.mT @ s.mT + step.mT @ u, vh.mT)
        return rows, (rows.mT @ u) @ s @ (vh @ columns), columns.mT

    def _move_core(self, moved: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Factors:
        """Take the S step and truncate."""
        core = s + u.mT @ (moved - u @ s @ vh) @ vh.mT
        left, values, right = self._truncated(*svd_of(core))
        return u @ left, values, right @ vh

    def _own_ranks(self) -> dict[str, int]:
        """Return the current ranks."""
        return {
            name: rank_of_energy(values, 1 - self.tolerance**2) if self._augmented else len(values)
            for name, values in self.spectrum().items()
        }

    def _values(self) -> dict[str, Tensor]:
        return {name: torch.linalg.svdvals(s) for name, (_, s, _) in self._factors.items()}

    def _state(self) -> State:
        parts = zip("usv", zip(*self._factors.values(), strict=True), strict=True)
        stored = {part: dict(zip(self._factors, tensors, strict=True)) for part, tensors in parts}
        tensors = {key: value for part, found in stored.items() for key, value in named(part, found).items()}
        return {"augmented": self._augmented, **tensors}

    def _load_state(self, state: State) -> None:
        self._augmented = bool(state.pop("augmented"))
        u, s, vh = (taken(part, state) for part in "usv")
        self._factors = {name: (u[name], s[name], vh[name]) for name in self.layers}
        super()._load_state(state)


def _basis(moved: Tensor, old: Tensor) -> Tensor:
    """Return an orthonormal basis for the columns of both matrices."""
    q: Tensor = torch.linalg.qr(torch.cat([old, moved], dim=2)).Q
    return q
