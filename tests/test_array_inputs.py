"""Does every public function of decompose, ranks and spectrum refuse by name what is not a dense tensor?

The calls run in an interpreter of their own, without the shape checks of the other tests: those would refuse first.
"""

import inspect
import json
import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch

import rankfold.decompose as decompose
import rankfold.ranks as ranks
import rankfold.spectrum as spectrum
from rankfold.errors import RankfoldError

ROOMS = {"decompose": decompose, "ranks": ranks, "spectrum": spectrum}
MATRIX, KERNEL, FOUR = torch.ones(4, 6), torch.ones(4, 3, 2), torch.ones(4, 3, 2, 1)
INPUTS = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
MOMENT, WEIGHTS = torch.eye(6), torch.ones(4)
PAIRED = {"out_shape": (2, 2), "in_shape": (2, 3)}
METRIC = {"second_moment": MOMENT, "output_weights": WEIGHTS}
# One row per public function: the arguments of a call that works, and which of them are tensors.
CALLS = {
    "decompose.block_singular_values": ({"matrix": MATRIX, **PAIRED}, ("matrix",)),
    "decompose.block_tensor_train": ({"matrix": MATRIX, **PAIRED, "rank": 1}, ("matrix",)),
    "decompose.coupled": (
        {"jacobians": torch.ones(3, 4, 20), "values": torch.ones(3, 4) @ INPUTS, "inputs": INPUTS, "rank": 1},
        ("jacobians", "values", "inputs", "initial"),
    ),
    "decompose.cp": ({"tensor": KERNEL, "rank": 1}, ("tensor", "initial")),
    "decompose.cp_errors": ({"tensor": KERNEL, "ranks": [1]}, ("tensor",)),
    "decompose.kronecker_sum": ({"matrix": MATRIX, **PAIRED, "rank": 1}, ("matrix",)),
    "decompose.metric_cp": ({"tensor": KERNEL, "rank": 1, **METRIC}, ("tensor", *METRIC)),
    "decompose.metric_cp_errors": ({"tensor": KERNEL, "ranks": [1], **METRIC}, ("tensor", *METRIC)),
    "decompose.metric_error": (
        {"matrix": MATRIX, "approximation": MATRIX, **METRIC},
        ("matrix", "approximation", *METRIC),
    ),
    "decompose.metric_tt_errors": ({"matrix": MATRIX, **PAIRED, "ranks": [1], **METRIC}, ("matrix", *METRIC)),
    "decompose.metric_tt_matrix": ({"matrix": MATRIX, **PAIRED, "rank": 1, **METRIC}, ("matrix", *METRIC)),
    "decompose.metric_tucker": ({"kernel": KERNEL, "rank": (1, 1), **METRIC}, ("kernel", *METRIC)),
    "decompose.metric_tucker_errors": ({"kernel": KERNEL, "ranks": [(1, 1)], **METRIC}, ("kernel", *METRIC)),
    "decompose.pair_modes": ({"matrix": MATRIX, **PAIRED}, ("matrix",)),
    "decompose.rearranged": ({"matrix": MATRIX, **PAIRED}, ("matrix",)),
    "decompose.separable": ({"kernel": FOUR, "rank": 1, **METRIC}, ("kernel", *METRIC)),
    "decompose.separable_errors": ({"kernel": FOUR, "ranks": [1], **METRIC}, ("kernel", *METRIC)),
    "decompose.shared_svd": ({"matrices": [MATRIX], "rank": 1, **METRIC}, ("matrices", *METRIC)),
    "decompose.singular_values": ({"matrix": MATRIX, **METRIC}, ("matrix", *METRIC)),
    "decompose.svd": ({"matrix": MATRIX, "rank": 1, **METRIC}, ("matrix", *METRIC)),
    "decompose.tensor_ring": ({"tensor": KERNEL, "rank": 1}, ("tensor",)),
    "decompose.tensor_train": ({"tensor": KERNEL, "rank": 1}, ("tensor",)),
    "decompose.tt_matrix": ({"matrix": MATRIX, **PAIRED, "rank": 1}, ("matrix",)),
    "decompose.tt_round": ({"train": decompose.TT((torch.ones(1, 4, 1), torch.ones(1, 6, 1))), "rank": 1}, ("train",)),
    "decompose.tt_roundings": ({"tensor": KERNEL, "ranks": [1]}, ("tensor",)),
    "decompose.tt_spectra": ({"tensor": KERNEL}, ("tensor",)),
    "decompose.tucker": ({"tensor": KERNEL, "rank": 1}, ("tensor",)),
    "decompose.tucker_errors": ({"tensor": KERNEL}, ("tensor",)),
    "decompose.values_of": (
        {
            "basis": decompose.Basis("legendre", 2),
            "u": MATRIX,
            "shapes": decompose.Shapes(torch.zeros(6, 0), torch.ones(6), torch.zeros(6)),
        },
        ("u",),
    ),
    "decompose.Neurons": (
        {"left": torch.ones(3, 2), "right": torch.ones(4, 2), "offset": torch.ones(2)},
        ("left", "right", "offset"),
    ),
    "ranks.energy": ({"values": torch.ones(4), "keep": 0.5}, ("values",)),
    "ranks.evbmf": ({"values": torch.ones(4), "shape": (4, 6)}, ("values",)),
    "ranks.stable_rank": ({"values": torch.ones(4)}, ("values",)),
    "spectrum.conv_singular_values": ({"kernel": KERNEL, "size": (4,)}, ("kernel",)),
    "spectrum.conv_symbol": ({"kernel": KERNEL, "size": (4,)}, ("kernel",)),
    "spectrum.effective_rank": ({"values": torch.ones(4)}, ("values",)),
    "spectrum.spectral_norm_bounds": ({"kernel": KERNEL}, ("kernel",)),
}
# Functions of shapes, numbers and NumPy arrays.
WITHOUT_TENSORS = {
    "decompose.balanced_shape",
    "decompose.bonds",
    "decompose.even_knots",
    "decompose.full_cp_rank",
    "decompose.monotone_curve",
    "decompose.ring_bonds",
    "ranks.allocate",
    "ranks.undominated",
}
WRONG = {
    "numpy": lambda tensor: tensor.numpy(),
    "list": lambda tensor: tensor.tolist(),
    "none": lambda _: None,
    "coo": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.to_sparse_csr(),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.flatten()] * 2, layout=torch.jagged),
    "meta": lambda tensor: tensor.to("meta"),
}
MATRICES_ONLY = {"csr"}
ARRAYS_WILL_DO = {"ranks.energy", "ranks.evbmf", "ranks.stable_rank"}
SHAPES_ALONE_WILL_DO = {"decompose.pair_modes", "decompose.rearranged", "decompose.values_of", "decompose.Neurons"}
PLAIN_TOO = {"decompose.shared_svd", "decompose.singular_values", "decompose.svd"}  # the metric is optional
OPTIONAL = {"output_weights", "initial"}


def found(room, name):
    return getattr(ROOMS[room], name)


def public_functions():
    return {
        f"{room}.{name}"
        for room, module in ROOMS.items()
        for name in module.__all__
        if inspect.isfunction(inspect.unwrap(found(room, name)))
    }


def cases():
    """Yield (name, argument, kind, call) of everything that has to be refused."""
    for name, (arguments, tensors) in CALLS.items():
        call = found(*name.split("."))
        for argument in tensors:
            given = arguments.get(argument)
            given = given[0] if isinstance(given, list) else given
            tensor = given if isinstance(given, torch.Tensor) else MATRIX
            for kind, wrong in WRONG.items():
                optional = kind == "none" and (
                    argument in OPTIONAL or (argument == "second_moment" and name in PLAIN_TOO)
                )
                fine = name in ARRAYS_WILL_DO and kind in ("numpy", "list")
                fine |= name in SHAPES_ALONE_WILL_DO and kind == "meta" and name != "decompose.Neurons"
                if optional or fine or (kind in MATRICES_ONLY and tensor.ndim != 2):
                    continue
                value = [wrong(tensor)] if argument == "matrices" and kind != "none" else wrong(tensor)
                yield name, argument, kind, partial(call, **{**arguments, argument: value})


def outcomes():
    """Return what each case raised."""
    results = []
    for name, argument, kind, call in cases():
        try:
            call()
        except RankfoldError as error:
            results.append((name, argument, kind, type(error).__name__, str(error)))
        except Exception as error:
            results.append((name, argument, kind, f"FOREIGN {type(error).__name__}", str(error)))
        else:
            results.append((name, argument, kind, "nothing", ""))
    return results


@pytest.fixture(scope="module")
def refused():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_public_function_is_in_the_table():
    tabled = {name for name in CALLS if name != "decompose.Neurons"}
    assert public_functions() == tabled | WITHOUT_TENSORS


def test_the_calls_of_the_table_work():
    for name, (arguments, tensors) in CALLS.items():
        found(*name.split("."))(**arguments)
        assert set(tensors) <= set(arguments) | OPTIONAL


def test_what_is_not_a_dense_tensor_is_refused(refused):
    assert len(refused) > 300
    assert [case for case in refused if case[3] != "DecompositionError"] == []


def test_the_refusal_says_what_was_given_and_what_to_do(refused):
    texts = {tuple(case[:3]): case[4] for case in refused}
    matrix = {kind: texts["decompose.svd", "matrix", kind] for kind in WRONG}
    assert matrix["numpy"] == (
        "matrix must be a torch.Tensor, got a numpy.ndarray of shape (4, 6): pass torch.as_tensor(matrix)"
    )
    assert "got a list: pass torch.as_tensor(matrix)" in matrix["list"]
    assert "got None" in matrix["none"]
    assert "layout sparse_coo: pass matrix.to_dense()" in matrix["coo"]
    assert "layout sparse_csr: pass matrix.to_dense()" in matrix["csr"]
    assert "layout mkldnn: pass matrix.to_dense()" in matrix["mkldnn"]
    assert "quantised tensor of dtype torch.qint8: pass matrix.dequantize()" in matrix["quantised"]
    assert "nested" in matrix["nested"]
    assert "meta device" in matrix["meta"]
    for (name, argument, kind), text in texts.items():
        if kind in ("numpy", "coo") and not name.startswith("ranks") and argument not in ("initial", "train"):
            assert argument in text, (name, argument, text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # some of these layouts are prototypes
    json.dump(outcomes(), sys.stdout)
