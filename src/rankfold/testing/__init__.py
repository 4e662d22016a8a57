"""Checks that a factorised layer of one's own keeps what the contract promises: plain functions, for any test runner.

Every check takes a class and a `Case`, and raises an `AssertionError` that says what is wrong. `check_layer` runs them
all; nothing here needs pytest.
"""

from rankfold.layers import registered
from rankfold.testing._case import Case
from rankfold.testing._check import CHECKS, check_layer
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

__all__ = [
    "CHECKS",
    "Case",
    "check_contract",
    "check_copies",
    "check_costs",
    "check_empty_batch",
    "check_errors",
    "check_full_rank",
    "check_gradients",
    "check_half_precision",
    "check_initialisation",
    "check_layer",
    "check_macs",
    "check_meta",
    "check_metric",
    "check_mode",
    "check_rank_grid",
    "check_saving",
    "check_seeds",
    "check_stages",
    "check_weight",
    "registered",
]
