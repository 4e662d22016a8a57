"""Does every layer run under autocast as its dense twin does: in its dtypes, within the rounding, gradients too?"""

import warnings

import pytest
import torch
from cases import FORM_IDS, FORMS, example_of, part_of
from torch import nn

from rankfold.layers import TABLE

DTYPES = [torch.float16, torch.bfloat16]


def case(layer, options):
    torch.manual_seed(0)
    dense, x = example_of(layer.dense_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer.from_dense(dense, rank=part_of(layer.full_rank(dense, **options)), **options), x


def passed(layer, x, dtype):
    """The output, and the gradients of a plain loss, under autocast where a dtype is given."""
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = layer(x)
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in layer.parameters()]


def distance(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
def test_autocast_rounds_as_the_dense_layers_does(layer, options, dtype):
    built, x = case(layer, options)
    eps = torch.finfo(dtype).eps
    output, gradients = passed(built, x, dtype)
    expected, truths = passed(built, x, None)
    twin, _ = passed(built.to_dense(), x, dtype)
    assert output.dtype in {dtype, twin.dtype}
    assert isinstance(built.to_dense(), nn.Embedding) or output.dtype == twin.dtype
    assert distance(output, expected) < 4 * max(distance(twin, expected), eps / 2)
    assert distance(output, expected) > 0  # it did run in this dtype
    for found, truth in zip(gradients, truths, strict=True):
        assert found.dtype == torch.float32
        assert distance(found, truth) < 6 * eps


def test_every_layer_is_among_the_cases():
    assert {layer for layer, _ in FORMS} == set(TABLE.values())
