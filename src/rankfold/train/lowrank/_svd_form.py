"""A model in SVD form: every weight is U diag(s) Vᵀ, to be trained until most of s is zero."""

from __future__ import annotations

from typing import Literal

from torch import nn

from rankfold.layers import layer_class, stock_twin
from rankfold.planning import Amounts, Choice, Plan
from rankfold.stats import count_params, walk
from rankfold.surgery import apply
from rankfold.train.lowrank._targets import FORM, Patterns, targets


def svd_form(
    model: nn.Module,
    split: str = "spatial",
    *,
    include: Patterns = (),
    exclude: Patterns = (),
    init: Literal["decompose", "random"] = "decompose",
    seed: int = 0,
) -> tuple[nn.Module, Plan]:
    """Return a new model with its layers in SVD form at full rank, and the plan to save and load it with.

    Each weight becomes U diag(s) Vᵀ, where s is a parameter. With `init="decompose"` the outputs are the same up to
    rounding. Train the model with `SVDTraining`, which keeps U and V orthonormal and makes s sparse, then prune it.
    The form is meant for training only: it has two to three times as many parameters.

    Args:
        model: any module; all Linear layers and convolutions that can be replaced are replaced.
        split: "spatial" splits a kernel (kh, kw) into (kh, 1) and (1, kw), "channel" into (kh, kw) and 1 x 1.
            Linear layers, and kernels that extend along one axis only, can be split in one way.
        include: names or patterns (`*`, `?`) of the layers to change; all layers if empty.
        exclude: names or patterns of layers to leave as they are.
        init: "decompose" the weights, or draw new ones at "random".
        seed: seed of the random weights.

    Returns:
        The model, and a plan that names every layer, with the reason for each that stays dense.

    Raises:
        LayerError: no layer can be replaced, or a weight holds NaN or Inf.
        PlanError: a pattern matches no layer.

    Reference:
        Yang et al. 2020, Learning low-rank deep neural networks via singular vector orthogonality regularization and
        singular value sparsification, section 3.1.

    Example:
        >>> import torch, rankfold as rf
        >>> model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(1, 3, 8, 8)
        >>> form, plan = svd_form(model)
        >>> form[2].rank, torch.allclose(form(x), model(x), atol=1e-5)
        (24, True)
    """
    options, reasons = targets(model, split, include, exclude)
    choices = {}
    for name, layer in walk(model):
        before = Amounts(count_params(layer))
        choices[name] = Choice("dense", amounts=before, dense=before, reason=reasons.get(name, ""))
        if name in options:
            dense = stock_twin(layer)
            cls = layer_class(dense, FORM)
            rank = cls.full_rank(dense, **options[name])
            cost = cls.cost(dense, (), rank=rank, **options[name])
            error = 0.0 if init == "decompose" else None
            choices[name] = Choice(FORM, rank, options[name], Amounts(cost.params), before, error=error)
    plan = Plan(choices, dense=Amounts(count_params(model)))
    return apply(model, plan, init=init, seed=seed), plan
