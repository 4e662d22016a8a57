"""The settings and the history of a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from rankfold._common import html_table, one_of, real, text_table, whole
from rankfold.train._losses import Loss
from rankfold.train.lowrank._method import TrainingMethod

Optimizer = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]


def _adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr)


def _sgd(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


ONLY = ("all", "factors")

OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType({"adamw": _adamw, "sgd": _sgd})


def _cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def _constant(_: float) -> float:
    return 1.0


SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType({"cosine": _cosine, "constant": _constant})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of `fit` that are rarely changed.

    Args:
        optimizer: "adamw", "sgd" (with Nesterov momentum 0.9), or a function of parameter groups and the learning
            rate. The default is AdamW, because its step does not depend on how the scale of a weight is distributed
            over its factors, which differs between layers and methods.
        schedule: "cosine" (to zero), "constant", or a function of the fraction of the run done, from 0 to 1, that
            returns a factor of the learning rate.
        warmup: fraction of all steps over which the learning rate rises from zero, 0 to 1.
        loss: the task loss, a function of the model's output and the target; by default the loss that the model
            itself returns, or else the cross-entropy with integer classes.
        temperature: temperature T of the distillation.
        alpha: weight of the distillation relative to the task, 0 to 1.
        decay: weight λ of the Frobenius decay λ/2 Σ ||W||² on the products of factorised layers.
        weight_decay: ordinary weight decay, for dense weights with two or more axes only.
        clip: largest norm of the gradient; `math.inf` for no clipping.
        batchnorm: number of batches on which BatchNorm statistics are re-estimated before the first step; 0 for none.
        only: which weights to train: "all", or "factors", the weights and biases of factorised layers. Ranks do not
            change.
        keep_best: whether to end with the weights of the epoch with the highest metric instead of the last epoch.
        promise: training ends after the first epoch whose metric is at least this, or else with the weights of the
            best epoch.
        method: a low-rank training method of this model, such as `SVDTraining(model)`: its penalty is added to the
            loss, it is notified of each step and epoch, and training stops once it is finished.
        watch: a function that is called with the row of each epoch when the epoch is over.
        checkpoint: file to write after each epoch, and to resume from if it exists.
        seed: seed for dropout, and for a `DataLoader` that shuffles without its own generator.
        progress: whether to show a progress bar on a terminal.

    Raises:
        RankfoldError: a value is out of range.

    Example:
        >>> Recipe(temperature=4.0, alpha=0.9).optimizer
        'adamw'
    """

    optimizer: str | Optimizer = "adamw"
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.05
    loss: Loss | None = None
    temperature: float = 2.0
    alpha: float = 0.7
    decay: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    batchnorm: int = 100
    only: str = "all"
    keep_best: bool = False
    promise: float | None = None
    method: TrainingMethod | None = None
    watch: Callable[[Epoch], None] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("warmup", "alpha"):
            real(name, getattr(self, name), most=1, ends="[]")
        for name in ("decay", "weight_decay"):
            real(name, getattr(self, name))
        real("temperature", self.temperature, ends="()")
        real("clip", self.clip, ends="(]")
        whole("batchnorm", self.batchnorm, 0)
        one_of("only", self.only, ONLY)
        if self.promise is not None:
            real("promise", self.promise, -math.inf, ends="()")
        if not callable(self.optimizer):
            one_of("optimizer", self.optimizer, OPTIMIZERS, other="a function of parameter groups and lr")
        if not callable(self.schedule):
            one_of("schedule", self.schedule, SCHEDULES, other="a function of the share done")

    @property
    def keeps_best(self) -> bool:
        """Whether training ends with the weights of the best epoch."""
        return self.keep_best or self.promise is not None

    def factor(self, done: float) -> float:
        """Return the factor of the learning rate after a fraction `done` of the run."""
        if done < self.warmup:
            return done / self.warmup
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return schedule((done - self.warmup) / (1 - self.warmup)) if self.warmup < 1 else 1.0

    def build_optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimiser of these parameter groups."""
        build = self.optimizer if callable(self.optimizer) else OPTIMIZERS[self.optimizer]
        return build(groups, lr)


STANDARD = Recipe()


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: means over its batches, with each term before weighting.

    `lr` is the learning rate of the last step. Terms and metrics that are not used are None.
    """

    epoch: int
    loss: float
    task: float | None
    distillation: float | None
    decay: float | None
    lr: float
    metric: float | None
    seconds: float
    penalty: float | None = None


COLUMNS: Mapping[str, str] = MappingProxyType(  # of the printed table: the field of an epoch and its format
    {
        "epoch": "d",
        "loss": ".4f",
        "task": ".4f",
        "distillation": ".4f",
        "decay": ".4g",
        "penalty": ".4g",
        "metric": ".4f",
        "lr": ".3g",
        "seconds": ".1f",
    }
)


@dataclass(frozen=True)
class History:
    """What a training run did; `print` shows it as a table, and a notebook does by itself.

    Attributes:
        epochs: one row per epoch.
        kept: the number of the epoch whose weights the model ends with.

    Example:
        >>> print(History((Epoch(1, 0.5, 0.5, None, None, 1e-3, 0.75, 2.0),), kept=1))
        epoch    loss    task  metric     lr  seconds
        -----  ------  ------  ------  -----  -------
            1  0.5000  0.5000  0.7500  0.001      2.0
        <BLANKLINE>
        weights kept: those of epoch 1
    """

    epochs: tuple[Epoch, ...]
    kept: int

    def __str__(self) -> str:
        """Return the epochs as an aligned table; a column without values is left out."""
        return "\n\n".join([text_table(*self._table()), self._ending()] if self.epochs else [self._ending()])

    def _repr_html_(self) -> str:
        return html_table(*self._table(), below=[self._ending()])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        used = [name for name in COLUMNS if any(getattr(epoch, name) is not None for epoch in self.epochs)]
        return used, [[_cell(epoch, name) for name in used] for epoch in self.epochs]

    def _ending(self) -> str:
        return f"weights kept: those of epoch {self.kept}" if self.epochs else "no epoch was trained"


def _cell(epoch: Epoch, name: str) -> str:
    value = getattr(epoch, name)
    return "" if value is None else format(value, COLUMNS[name])
