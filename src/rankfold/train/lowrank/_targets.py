"""The layers of a model that a low-rank training method works on, and their weights as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankfold._common import one_of
from rankfold.errors import LayerError
from rankfold.layers import TABLE, Options, folded, stock_twin, unfolded
from rankfold.planning import layer_refusal, selected, structural_refusals
from rankfold.stats import walk

SPLITS = ("channel", "spatial")
FORM = "svd_form"
Patterns = str | Sequence[str]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of `DistributedDataParallel` and `torch.compile`."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def targets(
    model: nn.Module, split: str, include: Patterns, exclude: Patterns
) -> tuple[dict[str, Options], dict[str, str]]:
    """Return the options of each layer to train for low rank, and the reason for each that is left alone.

    Raises:
        RankfoldError: the split is unknown.
        PlanError: a pattern matches no layer.
        LayerError: a weight holds NaN or Inf, or no layer can be trained for low rank.
    """
    one_of("split", split, SPLITS)
    layers = dict(walk(model))
    included = selected(layers, include) if include else set(layers)
    excluded = selected(layers, exclude)
    refused = structural_refusals(model)
    options: dict[str, Options] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        if name in excluded or name not in included:
            reasons[name] = "excluded" if name in excluded else "not included"
            continue
        reason = refused.get(name) or layer_refusal(name, layer) or _rankless(layer, split)
        if reason:
            reasons[name] = reason
        else:
            options[name] = _options(layer, split)
    if not options:
        told = "; ".join(f"{name or 'the model'!r} {reason}" for name, reason in list(reasons.items())[:3])
        raise LayerError(
            f"{type(model).__name__} has no Linear or convolution to train for low rank{f': {told}' if told else ''}"
        )
    return options, reasons


def _rankless(layer: nn.Module, split: str) -> str:
    """Return why no rank can be found for a layer, or an empty string."""
    twin = stock_twin(layer)
    form = TABLE.get((type(twin), FORM))
    if form is None:
        return f"{type(layer).__name__} has no SVD form"
    return "its full rank is 1" if form.full_rank(twin, **_options(layer, split)) == 1 else ""


def _options(layer: nn.Module, split: str) -> dict[str, Any]:
    """Return the options of a layer's SVD form; a kernel that extends along one axis is split by channels."""
    kernel: Any = getattr(layer, "kernel_size", ())
    if not kernel:
        return {}
    return {"split": split if sum(extent > 1 for extent in kernel) > 1 else "channel"}


def matrices_of(layer: Any, options: Options) -> Tensor:
    """Return the weight of a dense layer as matrices (groups, rows, columns), float32 or wider, detached."""
    twin: Any = stock_twin(layer)
    weight: Tensor = twin.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    return unfolded(weight.to(wide), groups=getattr(layer, "groups", 1), **options)


def weight_of(layer: Any, matrices: Tensor, options: Options) -> Tensor:
    """Return the weight of a dense layer from its matrices: the inverse of `matrices_of`."""
    shape = tuple(layer.weight.shape)
    transposed = type(stock_twin(layer)) is not type(layer)  # Hugging Face's Conv1D keeps (in, out)
    dense = folded(matrices, shape[::-1] if transposed else shape, **options)
    return dense.T if transposed else dense


@torch.no_grad()
def write_matrices(layer: Any, matrices: Tensor, options: Options) -> None:
    """Write matrices into the weight of a dense layer."""
    layer.weight.copy_(weight_of(layer, matrices, options))


def svd_of(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and Vᵀ of a batch of matrices."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u, s, vh


def mean_spectrum(values: Tensor) -> Tensor:
    """Return singular values (groups, rank), in any order, as one: descending, root mean square over the groups."""
    ordered = values.detach().abs().sort(dim=1, descending=True).values
    return ordered.double().square().mean(0).sqrt().cpu()


def forms_of(model: nn.Module) -> dict[str, Options]:
    """Return the options of every layer that is in SVD form."""
    found = {name: layer for name, layer in walk(model) if getattr(layer, "method", None) == FORM}
    return {name: dict(layer.options) for name, layer in found.items()}  # type: ignore[arg-type]


def layers_of(model: nn.Module, names: Mapping[str, Options]) -> dict[str, Any]:
    """Return the layers with these names."""
    inner = unwrapped(model)
    return {name: inner.get_submodule(name) for name in names}
