"""Trained rank pruning: dense training with a truncated SVD of the weights every few steps."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from rankfold._common import real, whole
from rankfold.ranks import energy as rank_of_energy
from rankfold.train.lowrank._dense_method import DenseMethod, named, taken
from rankfold.train.lowrank._method import State
from rankfold.train.lowrank._targets import Patterns, mean_spectrum, svd_of, weight_of


@final
class TRP(DenseMethod):
    """Train a dense model and replace its weights by their truncated SVD every few steps.

    A truncation keeps the leading singular values that make up the fraction `energy` of their sum of squares. The
    optional penalty λ <W, U_r V_rᵀ>, with the singular vectors of the last truncation, has the gradient λ U_r V_rᵀ, a
    subgradient of λ times the nuclear norm. Between truncations the rank may grow again, so what matters can come back.

    Args:
        model: a dense model; it is trained in place.
        split: how kernels are split, "spatial" or "channel".
        every: number of optimiser steps between truncations.
        energy: fraction of the squared singular values that a truncation keeps, 0 < x <= 1.
        nuclear: λ of the nuclear norm; 0 for none.
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value is out of range.

    Reference:
        Xu et al. 2019, Trained rank pruning for efficient deep neural networks.

    Example:
        >>> run = TRP(nn.Sequential(nn.Linear(8, 8)), every=1, energy=0.5)
        >>> run.step()
        >>> int((run.spectrum()["0"] > 1e-6).sum()) < 8
        True
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        split: str = "spatial",
        every: int = 20,
        energy: float = 0.98,
        nuclear: float = 3e-4,
        include: Patterns = (),
        exclude: Patterns = (),
    ) -> None:
        self.every = whole("every", every)
        self.energy = real("energy", energy, most=1, ends="(]")
        self.nuclear = real("nuclear", nuclear)
        super().__init__(model, split, include, exclude)
        self._directions: dict[str, Tensor] = {}

    def terms(self) -> dict[str, Tensor]:
        """Return the weighted term "nuclear"; empty before the first truncation."""
        if not self.nuclear or not self._directions:
            return {}
        products = [(layer.weight.float() * self._directions[name]).sum() for name, layer in self.layers.items()]
        return {"nuclear": self.nuclear * torch.stack(products).sum()}

    def _after_step(self) -> None:
        if self.steps % self.every:
            return
        for name, layer in self.layers.items():
            u, s, vh = svd_of(self.matrices(name))
            rank = rank_of_energy(mean_spectrum(s), self.energy)
            u, s, vh = u[:, :, :rank], s[:, :rank], vh[:, :rank]
            self.write(name, (u * s[:, None, :]) @ vh)
            if self.nuclear:
                self._directions[name] = weight_of(layer, u @ vh, self.options[name]).float()

    def _own_ranks(self) -> dict[str, int]:
        """Return the ranks that a truncation would keep now."""
        return {name: rank_of_energy(values, self.energy) for name, values in self.spectrum().items()}

    def _state(self) -> State:
        return named("direction", self._directions)

    def _load_state(self, state: State) -> None:
        self._directions = taken("direction", state)
        super()._load_state(state)
