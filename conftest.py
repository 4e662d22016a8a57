"""What all tests and all examples in docstrings and pages begin with."""

import os

# Tests compute on small tensors: a second thread only costs, and on a busy machine a pool of them stalls.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
