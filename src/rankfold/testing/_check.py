"""All checks, in one table and one call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rankfold.errors import LayerError
from rankfold.testing._case import Case
from rankfold.testing._function import (
    check_empty_batch,
    check_full_rank,
    check_gradients,
    check_half_precision,
    check_weight,
)
from rankfold.testing._promises import (
    check_contract,
    check_costs,
    check_errors,
    check_initialisation,
    check_macs,
    check_rank_grid,
)
from rankfold.testing._rows import check_metric, check_stages
from rankfold.testing._state import check_copies, check_meta, check_mode, check_saving, check_seeds

_CHECKS = (
    *(check_contract, check_full_rank, check_weight, check_gradients, check_errors, check_rank_grid, check_costs),
    *(check_macs, check_metric, check_stages, check_initialisation, check_mode, check_half_precision),
    *(check_empty_batch, check_meta, check_copies, check_seeds, check_saving),
)
CHECKS: Mapping[str, Callable[[Any, Case], None]] = MappingProxyType(
    {check.__name__.removeprefix("check_"): check for check in _CHECKS}
)
"""Name of a check -> the check: a function of a class and a case that raises an `AssertionError`."""


def check_layer(layer: Any, cases: Sequence[Case], *, without: Collection[str] = ()) -> None:
    """Check that a class keeps everything that the contract promises, on every case.

    All checks run before anything is raised, so that one run tells all that is wrong.

    Args:
        layer: the class. It need not be registered.
        cases: dense layers to try it on: one with a bias and one without, with all options that the class takes.
        without: names of `CHECKS` that are left out, such as "macs" for a layer that computes in another way for
            another size of its input.

    Raises:
        AssertionError: what is not kept, a line per check and case.
        LayerError: no cases, or an unknown name in `without`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rankfold.layers import LowRankLinear
        >>> check_layer(LowRankLinear, [Case(nn.Linear(12, 10), torch.randn(4, 12), rank=3)])
    """
    unknown = sorted(set(without) - CHECKS.keys())
    if unknown:
        raise LayerError(f"without={unknown[0]!r} is no check: there are {', '.join(CHECKS)}")
    if not cases:
        raise LayerError("there is nothing to check without a case: give a dense layer and an example of its input")
    wrong: list[tuple[str, Exception]] = []
    for case in cases:
        for name, check in CHECKS.items():
            if name in without:
                continue
            try:
                check(layer, case)
            except Exception as problem:  # whatever the class raises is what is wrong with it
                kind = "" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: "
                wrong.append((f"{name}, {case}: {kind}{problem}", problem))
    if wrong:
        told = "\n".join(line for line, _ in wrong)
        raise AssertionError(f"{layer.__name__} does not keep {len(wrong)} of its promises:\n{told}") from wrong[0][1]
