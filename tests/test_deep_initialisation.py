"""Does a deep stack of layers from scratch keep the variance of its activations, as a stack of dense layers does?"""

import math

import pytest
import torch
from cases import AXES, BIASED, form_name, part_of
from torch import nn

from rankfold.layers import TTLinear

DEPTH, WIDTH = 8, 16


def dense_of(kind):
    """A layer that maps white noise to white noise of a third of its variance: nothing is lost at the border."""
    if kind is nn.Linear:
        return nn.Linear(WIDTH, WIDTH, bias=False)
    return kind(WIDTH, WIDTH, 3, padding=1, padding_mode="circular", bias=False)


def log_variance(layer, x, draws):
    """The mean logarithm of the variance behind a stack of fresh layers, whose gain of 1/3 is undone."""
    logs = []
    with torch.no_grad():
        for _ in range(draws):
            h = x
            for _ in range(DEPTH):
                layer.reset_parameters()
                h = layer(h) * math.sqrt(3)
            logs.append(math.log(float(h.square().mean())))
    return sum(logs) / draws


@pytest.mark.parametrize(("layer", "options"), BIASED, ids=map(form_name, BIASED))
def test_eight_layers_keep_the_variance_as_eight_dense_ones_do(layer, options):
    dense = dense_of(layer.dense_type)
    x = torch.randn(64, WIDTH) if layer.dense_type is nn.Linear else torch.randn(2, WIDTH, *(4,) * AXES[type(dense)])
    built = layer.like(dense, rank=part_of(layer.full_rank(dense, **options)), **options)
    draws = 8
    assert log_variance(built, x, draws) == pytest.approx(log_variance(dense, x, draws), abs=1.2)


SHAPES = {2: (8, 8), 3: (4, 4, 4), 4: (2, 4, 2, 4), 5: (2, 2, 2, 2, 4), 6: (2,) * 6}


@pytest.mark.parametrize("order", SHAPES)
def test_trains_of_any_length_and_rank_keep_it(order):
    shape, x = SHAPES[order], torch.randn(64, 64)
    full = TTLinear.full_rank(nn.Linear(64, 64), in_shape=shape, out_shape=shape)
    for rank in (1, 2, 4, 8, 16):
        layer = TTLinear(64, 64, False, rank=min(rank, full), in_shape=shape, out_shape=shape)
        squares = []
        for _ in range(20):
            layer.reset_parameters()
            squares.append(float(layer(x).detach().square().mean()))
            assert float(layer.squared_norm().detach()) == pytest.approx(64 / 3, rel=1e-4)
        assert 3 * sum(squares) / len(squares) == pytest.approx(1, rel=0.2), rank
        if rank >= 8:  # a few products of few random numbers scatter, in a stack of them the more
            assert log_variance(layer, x, 8) == pytest.approx(0, abs=1.2), rank
