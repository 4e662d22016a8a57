"""The interface that every low-rank training method offers to a training loop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

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
    """A method of training that gives the layers of a model low rank.

    In a training loop, add `penalty()` to the loss (`total(loss)` does that, and raises an error at NaN), call
    `step()` after each optimiser step and `epoch()` after each epoch, and stop once `finished` is true, if the method
    has a stopping criterion. Then call `prune()`. If the loss cannot be changed, call `backward()` between the
    backward pass and the optimiser step instead.

    Attributes:
        model: the model being trained, as it was given.
        options: for each layer that the method works on, how its weight is split into two factors.
        layers: these layers by name.
        steps: number of optimiser steps so far.
        epochs: number of epochs so far.
        in_form: whether it trains a model in SVD form, which `svd_form` makes of a dense one.
    """

    in_form: ClassVar[bool] = False

    def __init__(self, model: nn.Module, options: Mapping[str, Options]) -> None:
        self.model = model
        self.options = dict(options)
        self.layers = layers_of(model, options)
        self.steps = 0
        self.epochs = 0

    @abstractmethod
    def dense(self) -> nn.Module:
        """Return the model with its current weights, all layers that the method works on as stock layers."""

    @property
    def finished(self) -> bool:
        """Whether it is time to prune; always False for a method that leaves the decision to the user."""
        return False

    def terms(self) -> dict[str, Tensor]:
        """Return the weighted terms of the penalty; empty if the method has none."""
        return {}

    def penalty(self) -> Tensor:
        """Return the penalty to add to the loss: a float32 scalar, 0 if the method has none."""
        terms = self.terms()
        if terms:
            return torch.stack(list(terms.values())).sum()
        return torch.zeros((), device=next(iter(self.layers.values())).weight.device)

    def total(self, loss: Tensor) -> Tensor:
        """Return loss + penalty after checking that both are finite.

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
        """Add the gradient of the penalty to the `.grad` of the parameters, bypassing the hooks of any wrapper.

        For training loops whose loss cannot be changed. Call it once per step, after the backward pass (and after
        `scaler.unscale_`, if there is a gradient scaler) and before the optimiser step.
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
        """Notify the method of an optimiser step."""
        self.steps += 1
        self._after_step()

    @torch.no_grad()
    def epoch(self) -> None:
        """Notify the method of the end of an epoch."""
        self.epochs += 1
        self._after_epoch()

    def spectrum(self) -> dict[str, Tensor]:
        """Return the current singular values of every layer, in float64, descending; root mean square over groups."""
        return {name: mean_spectrum(values) for name, values in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        """Return the singular values (groups, rank) of each layer."""
        return {
            name: torch.linalg.svdvals(matrices_of(layer, self.options[name])) for name, layer in self.layers.items()
        }

    def prune(
        self, *, energy: float | None = None, budget: Budget | None = None, example: Any = None
    ) -> tuple[nn.Module, Plan]:
        """Return a new model of plain low-rank layers, and its plan; the model being trained is not changed.

        Every weight is truncated by an SVD of its current value. That is the best approximation of its rank, even if
        a penalty has left the factors short of orthonormal. A layer becomes dense if its rank saves nothing.

        Args:
            energy: fraction of the squared singular values that each layer keeps, 0 < x <= 1.
            budget: instead of `energy`, a budget for the whole model: the plan of least error within it is chosen,
                over this method's layers and splits. Its fractions refer to the dense model.
            example: one input, to count MACs; required for a budget on MACs, otherwise they are put into the plan.

        Raises:
            RankfoldError: both energy and budget are given, or neither although the method finds no ranks itself.
            BudgetError: the budget is exceeded even with rank 1 everywhere; the message says what can be reached.

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
        """Run after each optimiser step."""

    def _after_epoch(self) -> None:  # noqa: B027 - a hook: most methods do nothing here
        """Run after each epoch."""

    def _own_ranks(self) -> dict[str, int] | None:
        """Return the ranks that the method has found, or None if it leaves the choice to `prune`."""
        return None

    def _state(self) -> State:
        """Return the state of the method besides the model: tensors, numbers, strings and lists of numbers."""
        return {}

    def _load_state(self, state: State) -> None:
        """Restore what `_state` returned."""
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
        """Return what a resumed run needs besides the model and the optimiser; the tensors are copies."""
        state = {"method": type(self).__name__, "steps": self.steps, "epochs": self.epochs, **self._state()}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            StoreError: the state belongs to another method or to other layers.
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
