"""Are the spectra of convolutions those of the explicit matrices?"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rankfold.errors import DecompositionError
from rankfold.spectrum import conv_singular_values, conv_symbol, effective_rank, spectral_norm_bounds

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operator(kernel, size, stride=1, circular=True):
    """The matrix of a convolution: its images of all unit inputs."""
    inputs = torch.eye(kernel.shape[1] * math.prod(size), dtype=torch.float64).reshape(-1, kernel.shape[1], *size)
    pads = [p for k in reversed(kernel.shape[2:]) for p in (0, k - 1)]
    padded = F.pad(inputs, pads, mode="circular") if circular else F.pad(inputs, pads)
    return CONV[len(size)](padded, kernel, stride=stride).flatten(1).T


CASES = [
    ((3, 2, 3), (8,), 1),
    ((2, 3, 3), (8,), 2),
    ((3, 2, 3, 3), (5, 6), 1),
    ((2, 3, 3, 2), (6, 4), 2),
    ((5, 1, 3, 3), (6, 6), 3),
    ((2, 2, 2, 2, 2), (2, 4, 2), 1),
    ((3, 2, 2, 1, 2), (4, 2, 2), 2),
]


@pytest.mark.parametrize("shape, size, stride", CASES)
def test_singular_values_are_those_of_the_matrix(shape, size, stride):
    kernel = random(*shape)
    expected = torch.linalg.svdvals(operator(kernel, size, stride))
    assert_close(conv_singular_values(kernel, size, stride=stride), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape, size", [((3, 2, 3), (9,)), ((3, 4, 3, 3), (6, 5)), ((2, 2, 2, 2, 2), (3, 3, 3))])
def test_bounds_hold_with_zero_and_circular_padding(shape, size):
    kernel = random(*shape)
    bounds = spectral_norm_bounds(kernel)
    largest = max(float(torch.linalg.matrix_norm(operator(kernel, size, circular=c), 2)) for c in (True, False))
    assert largest <= min(bounds)
    assert max(bounds) < 6 * largest


def test_bounds_of_a_matrix_are_its_norm():
    matrix = random(4, 6)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert spectral_norm_bounds(matrix) == pytest.approx((norm, norm))


def test_symbol_has_the_rank_of_a_factorised_kernel():
    kernel = torch.einsum("tr,rsij->tsij", random(6, 2), random(2, 5, 3, 3, seed=1))
    values = torch.linalg.svdvals(conv_symbol(kernel, (4, 4)))
    assert float(values[..., 2:].max()) < 1e-12
    assert float(values[..., 1].min()) > 1e-3


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


BAD = {
    "size below kernel": lambda: conv_symbol(random(1, 1, 3, 3), (2, 8)),
    "dims": lambda: conv_symbol(random(1, 1, 3, 3), (8,)),
    "stride": lambda: conv_singular_values(random(1, 1, 3), (8,), stride=3),
    "stride 0": lambda: conv_singular_values(random(1, 1, 3), (8,), stride=0),
    "matrix": lambda: conv_symbol(random(3, 3), ()),
    "nan": lambda: spectral_norm_bounds(torch.full((2, 2), math.nan)),
    "integers": lambda: spectral_norm_bounds(torch.ones(2, 2, dtype=torch.int64)),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_bad_input_is_refused(call):
    with pytest.raises(DecompositionError):
        call()
