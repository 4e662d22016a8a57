"""The terms of the training loss: task, distillation, and decay of the products of factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.errors import DataError, RankfoldError

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Terms:
    """The loss of one batch and its terms before weighting; None for a term that is not used."""

    loss: Tensor
    task: Tensor | None = None
    distillation: Tensor | None = None
    decay: Tensor | None = None
    penalty: Tensor | None = None

    def values(self) -> dict[str, float | None]:
        """Return the terms as plain numbers."""
        terms = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: None if term is None else float(term.detach()) for name, term in terms.items()}


def logits_of(output: Any) -> Tensor:
    """Return the logits from the output of a model.

    That is the tensor itself, the entry or attribute `logits` or `out`, or the first entry of a tuple.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return output[0]
    raise RankfoldError(
        f"the model returns {type(output).__name__}, in which no logits were found: pass Recipe(loss=…)"
    )


def task_loss(output: Any, target: Any, loss: Loss | None) -> Tensor | None:
    """Return the task loss, or None if a batch has no target.

    Without a loss function this is the loss that the model itself returned, or else the cross-entropy.
    """
    if loss is not None:
        return loss(output, target)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if target is None:
        return None
    if not isinstance(target, Tensor):
        raise RankfoldError(f"the target is a {type(target).__name__}, not a tensor of classes: pass Recipe(loss=…)")
    return F.cross_entropy(logits_of(output), target)


def distillation_loss(output: Any, taught: Any, temperature: float) -> Tensor:
    """Return T² KL(softmax(teacher / T) || softmax(student / T)), averaged over the positions of a batch.

    The classes are on axis 1 if the model returns a plain tensor, and on the last axis if its output is structured,
    as with language models. Computed in float32 whatever dtype the models use.

    Reference: Hinton, Vinyals, Dean 2015, section 2.
    """
    axis = 1 if isinstance(output, Tensor) else -1
    student, teacher = logits_of(output), logits_of(taught)
    if student.shape != teacher.shape or student.ndim < 2:
        raise RankfoldError(
            f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: distillation "
            "needs the same (batch, classes, …) of both"
        )
    student, teacher = (x.float().movedim(axis, -1).flatten(0, -2) / temperature for x in (student, teacher))
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    return divergence * temperature**2


def product_decay(layers: Sequence[nn.Module]) -> Tensor:
    """Return ½ Σ ||W||² over factorised layers, where W is the product of a layer's factors.

    Reference: Khodak, Tenenholtz, Mackey, Fusi 2021, section 3.2 (Frobenius decay). Decaying
    each factor separately would penalise the nuclear norm of the product instead, which lowers the rank.
    """
    norms = [layer.squared_norm() for layer in layers]  # type: ignore[operator]  # by the layers' contract
    return 0.5 * torch.stack([norm.float() for norm in norms]).sum()


def combine(  # noqa: PLR0913
    task: Tensor | None,
    distillation: Tensor | None,
    decay: Tensor | None,
    penalty: Tensor | None = None,
    *,
    alpha: float,
    lam: float,
) -> Terms:
    """Return (1 - alpha) task + alpha distillation + lam decay + penalty; without a target alpha is 1."""
    if task is None:
        if distillation is None:
            raise DataError("a batch has no target and there is no teacher: nothing to learn from")
        total = distillation
    else:
        total = task if distillation is None else (1 - alpha) * task + alpha * distillation
    total = total if decay is None else total + lam * decay
    return Terms(total if penalty is None else total + penalty, task, distillation, decay, penalty)
