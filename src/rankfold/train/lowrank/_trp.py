"""Trained rank pruning: dense training, interrupted every few steps by a truncated SVD of the weights."""

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

    At a truncation each weight keeps the leading singular values that hold the share `energy` of their squares. The
    optional penalty λ <W, U_r V_rᵀ>, with the vectors of the last truncation, has the subgradient λ U_r V_rᵀ of λ times
    the nuclear norm. Between truncations the rank grows again, so that what matters can come back.

    Args:
        model: a dense model; it is trained in place.
        split: how kernels are split, "spatial" or "channel".
        every: steps from one truncation to the next.
        energy: share of the squared singular values that a truncation keeps, 0 < x <= 1.
        nuclear: λ of the nuclear norm; 0 for none.
        include: names or patterns of the only layers to work on; all of them if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value out of its range.

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
        """Return the weighted term "nuclear", once there was a truncation."""
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
        """Return the ranks that a truncation now would keep."""
        return {name: rank_of_energy(values, self.energy) for name, values in self.spectrum().items()}

    def _state(self) -> State:
        return named("direction", self._directions)

    def _load_state(self, state: State) -> None:
        self._directions = taken("direction", state)
        super()._load_state(state)
