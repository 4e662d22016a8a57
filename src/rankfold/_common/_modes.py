"""Train and eval mode: every module is given its own flag back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Give every module of the models its train or eval mode back when the block ends."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode for the length of a block, then give every module its own mode back."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield
