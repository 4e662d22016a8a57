"""The training loop: recover accuracy after compression, or train a factorised model."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import batch_arguments, batch_target, device_of, modes_kept, real, to_device, track, whole
from rankfold.errors import DataError, RankfoldError, StoreError
from rankfold.layers import TiedHead, is_factorised
from rankfold.train._batchnorm import batchnorms, reestimate_batchnorm
from rankfold.train._checkpoint import (
    State,
    loader_generators,
    named_tensors,
    own_randomness,
    restore,
    resume,
    settings,
    snapshot,
    write_checkpoint,
)
from rankfold.train._losses import Terms, combine, distillation_loss, logits_of, product_decay, task_loss
from rankfold.train._recipe import STANDARD, Epoch, History, Recipe
from rankfold.train.lowrank._targets import unwrapped


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    evaluate: Callable[[nn.Module], float] | None = None,
    recipe: Recipe = STANDARD,
) -> History:
    """Train a model in place, optionally with a dense teacher.

    Minimises (1 - α) task + α T² KL(teacher || student) + λ/2 Σ ||W||², where W runs over the products of the
    factorised layers. The BatchNorm statistics are re-estimated before the first step. Batches without a target are
    learnt from by distillation only. Weights that do not require a gradient are left as they are. Train/eval flags and
    torch's global random state are restored at the end.

    Args:
        model: the model; it is trained on its own device.
        loader: batches, read once per epoch: tensors, tuples (inputs first, then the target) or dicts (keyword
            arguments; the target is under "labels" or "label").
        teacher: the model to learn from, usually the dense original; it runs in eval mode and is not changed.
        epochs: number of passes over the loader.
        lr: highest learning rate; warm-up and schedule are set in the recipe.
        evaluate: a function that is called after each epoch with the model in eval mode and returns a metric; higher
            is better.
        recipe: everything else: loss, temperature, decay, optimiser, checkpoint, seed, ….

    Returns:
        One row per epoch: the loss and its terms, learning rate, metric, seconds.

    Raises:
        DataError: the loader yields nothing, or is an iterator although it is needed more than once, or a batch has no
            target and there is no teacher.
        RankfoldError: a setting is out of range, the teacher shares weights with the model, or the loss is NaN or Inf;
            the model is then as it was after the last complete epoch.
        StoreError: the checkpoint cannot be written, is damaged, or belongs to another run.

    Reference:
        Hinton, Vinyals, Dean 2015 (distillation); Khodak et al. 2021 (decay of products).

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x = torch.randn(64, 4)
        >>> loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16, shuffle=True)
        >>> history = fit(nn.Linear(4, 2), loader, epochs=5, lr=0.1)
        >>> history.epochs[-1].loss < history.epochs[0].loss
        True
    """
    epochs, lr = whole("epochs", epochs), real("lr", lr, ends="()")
    _check(model, teacher, evaluates=evaluate is not None, recipe=recipe)
    device = device_of(model)
    optimizer = recipe.build_optimizer(trained_groups(model, recipe.weight_decay, recipe.only), lr)
    state = State(model, optimizer, device, loader_generators(loader), method=recipe.method)
    session = _Session(state, loader, teacher, recipe, epochs, evaluate)
    with (
        own_randomness(recipe.seed, device),
        modes_kept(model, *([] if teacher is None else [teacher])),
        torch.enable_grad(),
    ):
        common = settings(recipe, epochs=epochs, lr=lr, steps=session.steps, teacher=teacher is not None)
        session.start(common)
        try:
            for epoch in range(len(state.rows), epochs):
                if recipe.method is not None and recipe.method.finished:
                    break
                if recipe.promise is not None and state.best_metric >= recipe.promise:
                    break
                session.run(epoch)
                if recipe.checkpoint is not None:
                    write_checkpoint(recipe.checkpoint, state, common)
        finally:
            optimizer.zero_grad()
        if state.best is not None:
            restore(model, state.best)
    return History(tuple(state.rows), state.kept)


class _Session:
    """One call of `fit`: its fixed settings, around the state that changes."""

    def __init__(
        self,
        state: State,
        loader: Iterable[Any],
        teacher: nn.Module | None,
        recipe: Recipe,
        epochs: int,
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self.state, self.loader, self.teacher = state, loader, teacher
        self.recipe, self.epochs, self.evaluate = recipe, epochs, evaluate
        self.steps = _length(loader)
        self.rates = [group["lr"] for group in state.optimizer.param_groups]
        self.factorised = [m for m in state.model.modules() if is_factorised(m)] if recipe.decay else []
        self.parameters = [p for group in state.optimizer.param_groups for p in group["params"]]

    def start(self, common: dict[str, Any]) -> None:
        """Resume from the checkpoint, or prepare the model for its first step."""
        path = self.recipe.checkpoint
        if path is not None and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise StoreError(f"{os.fspath(path)} cannot be written: its directory does not exist")
        resumed = path is not None and os.path.exists(path)
        if path is not None and resumed:
            resume(path, self.state, common)
        prepare = not resumed and bool(self.recipe.batchnorm) and bool(batchnorms(self.state.model))
        passes = self.epochs - len(self.state.rows) + prepare
        if isinstance(self.loader, Iterator) and passes > 1:
            raise DataError(
                f"the loader is an iterator, which can be read once, and is needed {passes} times: pass a list or a "
                "DataLoader"
            )
        if prepare:
            reestimate_batchnorm(self.state.model, self.loader, batches=self.recipe.batchnorm)

    def run(self, epoch: int) -> None:
        """Train for one epoch, evaluate, and append its row."""
        began = time.perf_counter()
        self.state.model.train()
        if self.teacher is not None:
            self.teacher.eval()
        means = self._train(epoch)
        if self.recipe.method is not None:
            self.recipe.method.epoch()
        metric = self._metric()
        rate = self.state.optimizer.param_groups[0]["lr"]
        row = Epoch(epoch + 1, **means, lr=rate, metric=metric, seconds=time.perf_counter() - began)
        self.state.rows.append(row)
        better = self.recipe.keeps_best and metric is not None and metric > self.state.best_metric
        if better:
            self.state.best, self.state.best_metric = snapshot(self.state.model), metric or 0.0
        if better or self.state.best is None:
            self.state.kept = epoch + 1
        if self.recipe.watch is not None:
            self.recipe.watch(row)

    def _train(self, epoch: int) -> dict[str, Any]:
        """Take every step of an epoch; return the mean of each term of the loss."""
        good = snapshot(self.state.model)
        seen: dict[str, list[float | None]] = defaultdict(list)
        title = f"epoch {epoch + 1} of {self.epochs}"
        step = 0
        for batch in track(self.loader, title, total=self.steps, show=self.recipe.progress):
            step += 1
            self._set_rate(epoch, step)
            terms = self._terms(batch)
            bad = self._step(terms.loss)
            if bad:
                restore(self.state.model, good)
                raise RankfoldError(self._diagnosis(bad, epoch, step))
            for name, value in terms.values().items():
                seen[name].append(value)
        if not step:
            raise DataError(f"the loader yields no batch in epoch {epoch + 1}")
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters):
            restore(self.state.model, good)
            raise RankfoldError(self._diagnosis("a weight", epoch, step))
        return {name: _mean(values) for name, values in seen.items()}

    def _set_rate(self, epoch: int, step: int) -> None:
        """Set the learning rates of the step-th step, counted from 1, of an epoch, counted from 0.

        If the length of the loader is not known, the schedule advances once per epoch.
        """
        within = min((step - 0.5) / self.steps, 1.0) if self.steps else 0.5
        factor = self.recipe.factor((epoch + within) / self.epochs)
        for group, rate in zip(self.state.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _terms(self, batch: Any) -> Terms:
        args, kwargs = to_device(batch_arguments(batch), self.state.device)
        target = to_device(batch_target(batch), self.state.device)
        output = self.state.model(*args, **kwargs)
        distillation = None if self.teacher is None else self._distillation(self.teacher, batch, output)
        alone = distillation is not None and (target is None or self.recipe.alpha == 1)
        task = None if alone else task_loss(output, target, self.recipe.loss)
        decay = product_decay(self.factorised) if self.factorised else None
        penalty = None if self.recipe.method is None else self.recipe.method.penalty()
        return combine(task, distillation, decay, penalty, alpha=self.recipe.alpha, lam=self.recipe.decay)

    def _distillation(self, teacher: nn.Module, batch: Any, output: Any) -> Tensor:
        args, kwargs = to_device(batch_arguments(batch), device_of(teacher))
        with torch.no_grad():
            taught = logits_of(teacher(*args, **kwargs))
        return distillation_loss(output, taught.to(self.state.device), self.recipe.temperature)

    def _step(self, loss: Tensor) -> str:
        """Update the weights unless something is NaN or Inf; return what that is, or an empty string."""
        if not math.isfinite(loss.item()):
            return f"the loss ({loss.item()})"
        self.state.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        if not math.isfinite(norm.item()):
            return f"the norm of the gradient ({norm.item()})"
        self.state.optimizer.step()
        if self.recipe.method is not None:
            self.recipe.method.step()
        return ""

    def _diagnosis(self, bad: str, epoch: int, step: int) -> str:
        when = f"after epoch {epoch}" if epoch else "before training"
        rate = self.state.optimizer.param_groups[0]["lr"]
        return (
            f"{bad} is NaN or Inf in epoch {epoch + 1}, step {step}, at learning rate {rate:.3g}; the model is "
            f"as it was {when}. Lower lr, or look for NaN or Inf in the data"
        )

    def _metric(self) -> float | None:
        if self.evaluate is None:
            return None
        self.state.model.eval()
        with torch.no_grad():
            return float(self.evaluate(self.state.model))


def _check(
    model: nn.Module,
    teacher: nn.Module | None,
    *,
    evaluates: bool,
    recipe: Recipe,
) -> None:
    if recipe.keeps_best and not evaluates:
        name = "keep_best" if recipe.keep_best else "promise"
        raise RankfoldError(f"{name} needs evaluate=: a function that returns the metric of a model")
    if recipe.method is not None and unwrapped(recipe.method.model) is not unwrapped(model):
        raise RankfoldError("the method in the recipe is of another model: train method.model")
    if not trained_groups(model, recipe.weight_decay, recipe.only):
        kind = "weight" if recipe.only == "all" else "factorised layer with a weight"
        raise RankfoldError(f"the model has no {kind} that requires a gradient: nothing to train")
    tensors = {id(t): name for name, t in named_tensors(model).items()}
    on_meta = [name for name, t in named_tensors(model).items() if t.is_meta]
    if on_meta:
        raise RankfoldError(f"{on_meta[0]} is on the meta device: a model without values cannot be trained")
    shared = [] if teacher is None else [tensors[id(t)] for t in named_tensors(teacher).values() if id(t) in tensors]
    if shared:
        raise RankfoldError(
            f"the teacher shares {shared[0]} with the model and would change with it: copy the model first"
        )


def trained_groups(model: nn.Module, weight_decay: float, only: str = "all") -> list[dict[str, Any]]:
    """Return parameter groups: weight decay for dense weights, none for factors, biases and normalisation layers."""
    built = [layer for layer in model.modules() if is_factorised(layer) or isinstance(layer, TiedHead)]
    factors = {id(p) for layer in built for p in layer.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and (only == "all" or id(parameter) in factors):
            (decayed if parameter.ndim > 1 and id(parameter) not in factors else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _length(loader: Any) -> int | None:
    """Return the number of batches per epoch if the loader knows it."""
    try:
        return len(loader) or None
    except TypeError:  # also raised by a DataLoader of an iterable dataset
        return None


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
