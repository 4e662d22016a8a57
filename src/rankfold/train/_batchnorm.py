"""Re-estimate the statistics of BatchNorm layers, whose inputs have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold._common import batch_arguments, device_of, evaluating, to_device, whole
from rankfold.errors import DataError


def reestimate_batchnorm(model: nn.Module, loader: Iterable[Any], *, batches: int = 100) -> None:
    """Replace the running statistics of every BatchNorm layer by their average over some batches.

    With batch means m_i and unbiased batch variances v_i of n batches, the running mean becomes
    (m_1 + … + m_n) / n and the running variance (v_1 + … + v_n) / n, each layer fed by the layers before it
    normalised with their batch statistics. Nothing else in the model changes, its weights and modes
    included. This often recovers most of the accuracy lost in one-shot compression, at the cost of forward passes
    only. If the model has no such layers, nothing is done and the loader is not read.

    Args:
        model: the model; it is changed in place.
        loader: batches: tensors, tuples (inputs first) or dicts (keyword arguments); targets are not used. The
            inputs should be those of training, with the same augmentation, because the statistics describe them.
        batches: largest number of batches to read; 100 to 500 are usual.

    Raises:
        RankfoldError: `batches` is not a whole number >= 1.
        DataError: the loader yields nothing, or the statistics are NaN or Inf. After this or any other exception
            the old statistics are in place.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
        >>> x = torch.randn(64, 4)
        >>> reestimate_batchnorm(model, [x])
        >>> torch.allclose(model(x).mean(0), torch.zeros(8), atol=1e-5)
        True
    """
    whole("batches", batches)
    layers = batchnorms(model)
    if not layers:
        return
    device = device_of(model)
    with evaluating(model), _momentum_kept(layers), _statistics_unless_done(layers), torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # makes torch take the cumulative average
            layer.train()
        count = 0
        for batch in islice(loader, batches):
            args, kwargs = to_device(batch_arguments(batch), device)
            model(*args, **kwargs)
            count += 1
        if not count:
            raise DataError("the loader yields no batch to estimate the BatchNorm statistics from")
        if not all(torch.isfinite(tensor).all() for layer in layers for tensor in _statistics(layer)):
            raise DataError(
                "the BatchNorm statistics over these batches are NaN or Inf: look for such values in the data"
            )


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _momentum_kept(layers: list[_BatchNorm]) -> Iterator[None]:
    momenta = [layer.momentum for layer in layers]
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def _statistics_unless_done(layers: list[_BatchNorm]) -> Iterator[None]:
    old = [[tensor.clone() for tensor in _statistics(layer)] for layer in layers]
    try:
        yield
    except BaseException:  # not even Ctrl-C may leave half an average behind
        for layer, tensors in zip(layers, old, strict=True):
            for now, before in zip(_statistics(layer), tensors, strict=True):
                now.copy_(before)
        raise


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    return [t for t in (layer.running_mean, layer.running_var, layer.num_batches_tracked) if t is not None]
