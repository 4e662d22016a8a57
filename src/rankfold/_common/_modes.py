"""Train and eval mode: the flag of every module is restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every module of the models when the block ends."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode within a `with` block, and restore the mode of every module afterwards."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield
