"""What all tests and all examples in docstrings and pages begin with."""

import os

# Tests compute on small tensors: a second thread only costs, and on a busy machine a pool of them stalls.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

LONG = (  # what `make quick` leaves out: files of many seconds each
    *("reproducible", "structured_layers", "metric", "recalibration", "search", "odd_models", "cp", "layer_errors"),
    *("svd_training", "autocast", "layers_elsewhere", "transformers", "one_road", "conformity", "store", "scripts"),
    *("layer_initialisation", "svd", "training_elsewhere", "layer_gradients", "layer_times", "training_methods"),
    *("register", "docs", "coupled", "array_inputs", "bad_input", "block_plans", "flexible_conv", "own_method_guide"),
    *("flexible", "export", "tt_layers", "tt_contraction", "structured_decompositions", "attention", "plots"),
)


def pytest_addoption(parser):
    """Add what `make quick` says."""
    parser.addoption("--quick", action="store_true", help="leave out the files of many seconds, and all pages")


def pytest_ignore_collect(collection_path, config):
    """Leave out what takes long, where that was asked for."""
    if not config.getoption("--quick"):
        return None
    long = collection_path.name in {f"test_{name}.py" for name in LONG}
    return True if long or collection_path.suffix == ".md" else None


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
