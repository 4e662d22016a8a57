"""What every low-rank training method offers to a training loop, whatever it does inside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import real
from rankfold.errors import RankfoldError, StoreError
from rankfold.layers import Options
from rankfold.planning import Budget, Plan
from rankfold.ranks import energy as rank_of_energy
from rankfold.surgery import apply
from rankfold.train.lowrank._pruning import plan_of_budget, plan_of_ranks, stats_of
from rankfold.train.lowrank._targets import layers_of, matrices_of, mean_spectrum

State = dict[str, Any]


class TrainingMethod(ABC):
    """A way of training after which the layers of a model have low rank.

    In a loop: add `penalty()` to the loss (`total(loss)` does, and stops at NaN), call `step()` after each step of the
    optimiser and `epoch()` after each epoch, stop when `finished` is true (where the method knows), then `prune()`. A
    loop whose loss cannot be changed calls `backward()` between its own backward and the step of the optimiser instead.

    Attributes:
        model: the model in training, as it was given.
        options: per layer that the method works on, how its weight is split into two.
        layers: these layers.
        steps: steps of the optimiser so far.
        epochs: epochs so far.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Options]) -> None:
        self.model = model
        self.options = dict(options)
        self.layers = layers_of(model, options)
        self.steps = 0
        self.epochs = 0

    @abstractmethod
    def dense(self) -> nn.Module:
        """Return the model with stock layers only where the method works; its weights are those of now."""

    @property
    def finished(self) -> bool:
        """Whether the method says that it is time to prune; False where it leaves that to its user."""
        return False

    def terms(self) -> dict[str, Tensor]:
        """Return the terms of the penalty, each weighted; empty where the method has none."""
        return {}

    def penalty(self) -> Tensor:
        """Return the sum of the terms to add to the loss: a scalar in float32, 0 where the method has no penalty."""
        terms = self.terms()
        if terms:
            return torch.stack(list(terms.values())).sum()
        return torch.zeros((), device=next(iter(self.layers.values())).weight.device)

    def total(self, loss: Tensor) -> Tensor:
        """Return loss + penalty, once both are known to be finite.

        Raises:
            RankfoldError: one of them is NaN or Inf; the message names the step.
        """
        total = loss + self.penalty()
        if not math.isfinite(total.item()):
            bad = "loss" if not math.isfinite(loss.item()) else "penalty"
            raise RankfoldError(
                f"the {bad} is NaN or Inf in step {self.steps + 1}: go back to the last checkpoint, and lower the "
                "learning rate or look for such values in the data"
            )
        return total

    def backward(self) -> None:
        """Add the gradient of the penalty to the `.grad` of the parameters, past the hooks of any wrapper.

        For loops whose loss is out of reach: once a step, after their backward (and after `scaler.unscale_` where a
        gradient scaler is used), before the step of the optimiser.
        """
        parameters = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
        with torch.enable_grad():
            penalty = self.penalty()
            if not penalty.requires_grad:
                return
            gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @torch.no_grad()
    def step(self) -> None:
        """Tell the method that the optimiser has taken a step."""
        self.steps += 1
        self._after_step()

    @torch.no_grad()
    def epoch(self) -> None:
        """Tell the method that an epoch is over."""
        self.epochs += 1
        self._after_epoch()

    def spectrum(self) -> dict[str, Tensor]:
        """Return the singular values of every layer now, descending, in float64; over groups their root mean square."""
        return {name: mean_spectrum(values) for name, values in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        """Return singular values (groups, rank) per layer."""
        return {
            name: torch.linalg.svdvals(matrices_of(layer, self.options[name])) for name, layer in self.layers.items()
        }

    def prune(
        self, *, energy: float | None = None, budget: Budget | None = None, example: Any = None
    ) -> tuple[nn.Module, Plan]:
        """Return a new model of plain low-rank layers, and its plan; the model in training is not changed.

        Every weight is cut by the SVD of what it is now, so that it is the best of its rank and keeps what is promised
        even where a penalty left the factors short of orthonormal. A layer whose rank saves nothing becomes dense.

        Args:
            energy: the share of the squared singular values that each layer keeps, 0 < x <= 1.
            budget: instead, a budget on the whole: the plan of least error within it, over this method's layers and
                splits. Its fractions are of the dense model.
            example: one input, for MACs: needed for a budget on them, otherwise to have them in the plan.

        Raises:
            RankfoldError: energy and budget at once, or neither where the method finds no ranks of its own.
            BudgetError: a budget that rank 1 everywhere exceeds; the message says what can be reached.

        Reference:
            Yang et al. 2020, section 3.3 (energy).
        """
        if energy is not None and budget is not None:
            raise RankfoldError("prune by energy= or by budget=, not by both")
        dense = self.dense()
        if budget is not None:
            found = plan_of_budget(dense, self.options, budget, example)
        else:
            ranks = self._ranks(energy, dense)
            chosen = {name: (rank, self.options[name]) for name, rank in ranks.items()}
            found = plan_of_ranks(dense, chosen, stats_of(dense, example))
        return apply(dense, found), found

    def _after_step(self) -> None:  # noqa: B027 - a hook: most methods do nothing here
        """Do what follows a step of the optimiser."""

    def _after_epoch(self) -> None:  # noqa: B027 - a hook: most methods do nothing here
        """Do what follows an epoch."""

    def _own_ranks(self) -> dict[str, int] | None:
        """Return the ranks that the method itself has found, or None where it leaves them to `prune`."""
        return None

    def _state(self) -> State:
        """Return what the method must remember beside the model: tensors, numbers, texts and lists of numbers."""
        return {}

    def _load_state(self, state: State) -> None:
        """Take over what `_state` returned."""
        if state:
            raise KeyError(f"unknown entries {sorted(state)}")

    def _ranks(self, energy: float | None, dense: nn.Module) -> dict[str, int]:
        own = self._own_ranks() if energy is None else None
        if own is not None:
            return own
        if energy is None:
            raise RankfoldError("say how far to prune: energy=0.999, or budget=Budget(macs=0.5) with example=")
        keep = real("energy", energy, most=1, ends="(]")
        matrices = {name: matrices_of(dense.get_submodule(name), options) for name, options in self.options.items()}
        return {
            name: rank_of_energy(mean_spectrum(torch.linalg.svdvals(weights.double())), keep)
            for name, weights in matrices.items()
        }

    def state_dict(self) -> State:
        """Return what a resumed run needs beside the model and the optimiser; copies, not views."""
        state = {"method": type(self).__name__, "steps": self.steps, "epochs": self.epochs, **self._state()}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StoreError: the state is of another method or of other layers.
        """
        rest = dict(state)
        if rest.pop("method", None) != type(self).__name__:
            raise StoreError(f"this is the state of {state.get('method')!r}, not of {type(self).__name__}")
        try:
            self.steps, self.epochs = int(rest.pop("steps")), int(rest.pop("epochs"))
            self._load_state(rest)
        except (KeyError, TypeError, RuntimeError) as problem:
            raise StoreError(
                f"the state of {type(self).__name__} is incomplete or of other layers: {problem}"
            ) from problem
