"""Do the layers have exactly the weights that the papers and their code give, and is the naive kernel what it says?"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # the reproductions are not installed

from reproduce.training import params
from reproduce.tt_conv.model import FC_LAYERS, LAYERS, KernelTT, dense_layer, fc_layer, kernel_weights, tt_layer
from reproduce.tt_mnist.run import HIDDEN, hidden_layer
from reproduce.wide_net.model import equal_width, wide

FACTORISED = [name for name, (*_, bonds) in LAYERS.items() if bonds]


def test_the_convolutions_of_garipov_have_169958_weights_and_the_dense_ones_3_26_times_more():
    train = 3 * 64 * 9 + sum(params(tt_layer(name)) for name in FACTORISED)
    dense = sum(params(dense_layer(name)) for name in LAYERS)
    assert (train, dense) == (169_958, 554_688)
    assert round(dense / train, 2) == 3.26


def test_the_network_with_fully_connected_layers_is_42_3_times_smaller():
    train = 3 * 64 * 9 + sum(params(tt_layer(name, (16, 16, 16))) for name in FACTORISED)
    dense = sum(params(dense_layer(name)) for name in LAYERS)
    layers = [fc_layer(name) for name in FC_LAYERS]
    last = 512 * 10
    train, dense = train + last, dense + last
    assert round((dense + 8192 * 1536 + 1536 * 512) / (train + sum(map(params, layers))), 1) == 42.3


@pytest.mark.parametrize(("kind", "rank", "weights"), [("4^5", 8, 3328), ("32×32", 1, 2048), ("matrix", 4, 8192)])
def test_the_hidden_layers_on_mnist_have_the_weights_of_their_formulas(kind, rank, weights):
    assert params(hidden_layer(kind, rank)) - HIDDEN == weights


def test_the_dense_network_beside_the_wide_one_has_as_many_parameters():
    whole = params(wide(2))
    assert whole == 624 + 640 + 2 * (262_144 + 4_096) + 40_970
    assert abs(equal_width(whole) * (3_072 + 2 + 10) + 10 - whole) <= 3_084 / 2


def test_the_naive_kernel_is_the_product_of_its_cores():
    torch.manual_seed(0)
    layer = KernelTT(5, 7, 3, rank=4, padding=1)
    assert params(layer) == kernel_weights((3, 3, 5, 7), 4)
    expected = torch.einsum("axb,byc,csd,dte->tsxy", *layer.cores)
    torch.testing.assert_close(layer.weight, expected)
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, expected, padding=1))


def test_clipped_to_what_the_modes_can_use_the_same_kernels_have_106437_weights():
    clipped = [(9, *LAYERS[name][3][1:-1], 16) for name in FACTORISED]
    layers = [tt_layer(name, bonds) for name, bonds in zip(FACTORISED, clipped, strict=True)]
    assert 3 * 64 * 9 + sum(map(params, layers)) == 106_437
