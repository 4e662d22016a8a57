"""Shapes in annotations are checked during tests: jaxtyping with beartype, inert in production."""

import os

# Tests compute on small tensors: a second thread only costs, and on a busy machine a pool of them stalls.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if os.environ.get("RANKFOLD_CHECK_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["rankfold.decompose", "rankfold.ranks", "rankfold.spectrum"], "beartype.beartype")


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
