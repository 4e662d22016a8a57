"""Learn the ranks by alternating between learning and compression steps (LC)."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from rankfold._common import real, whole
from rankfold.layers import layer_class, stock_twin
from rankfold.stats import Stats
from rankfold.train.lowrank._dense_method import DenseMethod, named, taken
from rankfold.train.lowrank._method import State
from rankfold.train.lowrank._pruning import stats_of
from rankfold.train.lowrank._targets import Patterns, mean_spectrum, svd_of, weight_of


@final
class LC(DenseMethod):
    """Pull the weights towards low-rank matrices whose ranks are optimised again every few steps.

    The L step trains loss + μ/2 sum_l ||W_l - Θ_l - Λ_l/μ||². The C step, every `every` steps, sets Θ_l to the
    truncated SVD of W_l - Λ_l/μ at the rank that minimises strength * cost(r) + μ/2 sum_{i>r} s_i², then
    Λ_l <- Λ_l - μ (W_l - Θ_l) and μ <- growth * μ. The cost is a fraction of the dense layers' parameters, or of their
    MACs if there is an example; a component is kept if s² > 2 strength * cost(1) / μ. As μ grows, the ranks rise and W
    approaches Θ.

    Args:
        model: a dense model; it is trained in place.
        strength: weight of the cost relative to the loss.
        mu: initial value of μ, above 0.
        growth: what μ is multiplied by after each C step, at least 1; 1.1 to 1.4 are usual.
        every: number of optimiser steps between C steps.
        example: one input of the model; the cost is then in MACs instead of parameters.
        split: how kernels are split, "spatial" or "channel".
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.

    Raises:
        LayerError: no layer can be trained for low rank.
        RankfoldError: a value is out of range.

    Reference:
        Idelbayev and Carreira-Perpiñán 2020, Low-rank compression of neural nets: learning the rank of each layer.

    Example:
        >>> run = LC(nn.Sequential(nn.Linear(8, 8)), strength=1.0, every=1)
        >>> run.step()
        >>> list(run.terms()), run.prune()[1].layers["0"].rank
        (['distance'], 1)
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        *,
        strength: float = 10.0,
        mu: float = 1e-2,
        growth: float = 1.2,
        every: int = 100,
        example: Any = None,
        split: str = "spatial",
        include: Patterns = (),
        exclude: Patterns = (),
    ) -> None:
        self.strength = real("strength", strength)
        self.every = whole("every", every)
        self.mu = real("mu", mu, ends="()")
        self.growth = real("growth", growth, 1)
        super().__init__(model, split, include, exclude)
        self._costs = self._cost_of_a_rank(stats_of(self.dense(), example))
        self._multipliers = {name: torch.zeros_like(self.matrices(name)) for name in self.layers}
        self._low_rank: dict[str, Tensor] = {}
        self._ranks_found: dict[str, int] = {}
        self._compress()

    def terms(self) -> dict[str, Tensor]:
        """Return the term "distance", μ/2 sum ||W - Θ - Λ/μ||²."""
        distances = []
        for name, layer in self.layers.items():
            target = self._low_rank[name] + self._multipliers[name] / self.mu
            distances.append((layer.weight.float() - weight_of(layer, target, self.options[name])).square().sum())
        return {"distance": 0.5 * self.mu * torch.stack(distances).sum()}

    def _cost_of_a_rank(self, stats: Stats | None) -> dict[str, float]:
        """Return what each additional rank costs per layer, as a fraction of the cost of all dense layers."""
        costs, total = {}, 0
        for name, layer in self.layers.items():
            twin = stock_twin(layer)
            cls, calls = layer_class(twin, "svd"), stats.layers[name].calls if stats else ()
            one, two = (cls.cost(twin, calls, rank=rank, **self.options[name]) for rank in (1, 2))
            costs[name] = two.macs - one.macs if stats else two.params - one.params
            total += stats.layers[name].macs * stats.batch_size if stats else layer.weight.numel()
        return {name: cost / total for name, cost in costs.items()}

    @torch.no_grad()
    def _compress(self) -> None:
        """Take a C step with the current μ and Λ."""
        for name, cost in self._costs.items():
            u, s, vh = svd_of(self.matrices(name) - self._multipliers[name] / self.mu)
            least = math.sqrt(2 * self.strength * cost / self.mu)
            rank = max(1, int((mean_spectrum(s) * math.sqrt(len(s)) > least).sum()))
            self._ranks_found[name] = rank
            self._low_rank[name] = (u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank]

    def _after_step(self) -> None:
        if self.steps % self.every:
            return
        self._compress()
        for name in self.layers:
            self._multipliers[name] -= self.mu * (self.matrices(name) - self._low_rank[name])
        self.mu *= self.growth

    def _own_ranks(self) -> dict[str, int]:
        """Return the ranks found by the last C step."""
        return dict(self._ranks_found)

    def _state(self) -> State:
        found = {"ranks": dict(self._ranks_found), "mu": self.mu}
        return {**found, **named("low_rank", self._low_rank), **named("multiplier", self._multipliers)}

    def _load_state(self, state: State) -> None:
        self.mu = float(state.pop("mu"))
        self._ranks_found = {name: int(rank) for name, rank in state.pop("ranks").items()}
        self._low_rank, self._multipliers = taken("low_rank", state), taken("multiplier", state)
        super()._load_state(state)
