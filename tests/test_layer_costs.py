"""Does a class know, without building a layer, what it would cost and how far from the dense one it would be?"""

import math

import pytest
import torch
from cases import CONVOLUTIONS, FORM_IDS, FORMS, dense_layers, example_of, form_name, part_of, small_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import layers
from rankfold.layers import Call, Cost
from rankfold.testing import Case, check_costs, check_macs

few = settings(max_examples=8, deadline=None, derandomize=True)
# tensor trains and their kin merge cores once a call, in an order planned for the batch: see test_tt_layers.py
# layers in SVD form rebuild their weight where that is cheaper: see test_svd_training.py
CHAINS = [form for form in FORMS if form[0].method not in ("tt", "kronecker", "ring", "svd_form")]
forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the dense layer


def counted(module, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = module(x)
    return Call(tuple(x.shape), tuple(output.shape)), counter.get_total_flops() // 2


def params(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("layer", "options"), CHAINS, ids=map(form_name, CHAINS))
@given(data=st.data(), share=st.floats(0, 1))
@few
def test_costs_are_those_of_the_built_layer(layer, options, data, share):
    dense, x = data.draw(dense_layers(layer.dense_type))
    if x.ndim == 1 or (hasattr(dense, "kernel_size") and x.ndim == len(dense.kernel_size) + 1):
        x = x[None]  # the counter takes the first axis of an input without a batch for one
    case = Case(dense, x, part_of(layer.full_rank(dense, **options), share), options)
    check_costs(layer, case)
    check_macs(layer, case)
    call, macs = counted(dense, x)
    assert layers.dense_cost(dense, [call]) == Cost(params(dense), macs)


@pytest.mark.parametrize(("layer", "options"), CONVOLUTIONS, ids=map(form_name, CONVOLUTIONS))
def test_a_call_without_a_batch_costs_as_a_batch_of_one(layer, options):
    dense, x = example_of(layer.dense_type)
    rank = small_rank(layer, dense, options)
    costs = [
        layer.cost(dense, [Call(tuple(y.shape), tuple(dense(y).shape))], rank=rank, **options) for y in (x[:1], x[0])
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_the_cost_of_a_transposed_convolution(kind):
    axes = int(kind.__name__[-2])
    layer, x = kind(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, *(5, 4, 3)[:axes])
    call, macs = counted(layer, x)
    assert layers.dense_cost(layer, [call]) == Cost(params(layer), macs)


@pytest.mark.parametrize("multiple", [1, 4, 8])
@forms
def test_rank_grids_are_usable(layer, options, multiple):
    kind = layer.dense_type
    wide = {
        "in_features": 4096,
        "out_features": 2048,
        "device": "meta",
    }  # large enough for multiples in a grid of blocks
    changes = wide if kind is nn.Linear else {"in_channels": 64, "out_channels": 96}
    dense, _ = example_of(kind, **({"num_embeddings": 500, "embedding_dim": 64} if kind is nn.Embedding else changes))
    grid = layer.rank_grid(dense, multiple=multiple, **options)
    full = layer.full_rank(dense, **options)
    sizes = [layer.cost(dense, [], rank=rank, **options).params for rank in grid]
    assert 2 <= len(grid) <= 400
    assert len(set(grid)) == len(grid)
    assert sizes == sorted(sizes)
    assert sizes[-1] < params(dense)
    assert sizes[0] <= params(dense) / 3
    for rank in grid:
        pairs = zip(rank, full, strict=True) if isinstance(rank, tuple) else [(rank, full)]
        assert all(1 <= r <= most and (r % multiple == 0 or r == most) for r, most in pairs)
    assert bool(layer.variants(dense)) == (layer.method != "svd_form")  # a form to train in is planned for no budget


def test_a_grid_reaches_up_to_the_break_even():
    dense = nn.Linear(512, 512)
    grid = layers.LowRankLinear.rank_grid(dense)
    assert grid[0] == 1
    assert grid[-1] == 255
    assert max(b - a for a, b in zip(grid, grid[1:], strict=False)) <= 4


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        (nn.Conv2d(8, 8, 1), {"svd": [{"split": "channel"}], "cp": [], "tucker": []}),
        (nn.Conv2d(8, 8, 3, groups=8), {"svd": [{"split": "spatial"}], "cp": [], "tucker": []}),
        (nn.Conv2d(64, 64, (1, 3)), {"svd": [{"split": "channel"}], "cp": [{"separable": False}], "tucker": [{}]}),
        (nn.Conv1d(32, 32, 5), {"svd": [{"split": "channel"}], "cp": [{"separable": False}], "tucker": [{}]}),
        (nn.Linear(1, 7), {"svd": []}),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_variants_are_the_forms_that_can_pay(dense, expected):
    methods = [method for method in layers.methods_for(dense) if method in expected]
    assert {m: list(layers.layer_class(dense, m).variants(dense)) for m in methods} == expected


@forms
def test_predicted_errors_bound_the_errors(layer, options):
    dense, _ = example_of(layer.dense_type, dtype=torch.float64)
    ranks = [small_rank(layer, dense, options), layer.full_rank(dense, **options)]
    predicted = layer.errors(dense, ranks, **options)
    assert len(predicted) == 2
    assert predicted[1] < 1e-6
    built = layer.from_dense(dense, rank=ranks[0], **options)
    actual = float((built.weight - dense.weight).norm().detach() / dense.weight.norm().detach())
    assert 0 < actual < predicted[0] * 1.02
    assert predicted[0] < 1


@forms
def test_spectra_tell_the_error_of_truncating(layer, options):
    dense, _ = example_of(layer.dense_type, dtype=torch.float64)
    spectra, full = layer.spectra(dense, **options), layer.full_rank(dense, **options)
    sizes = full if isinstance(full, tuple) else (full,)
    assert len(spectra) in (0, len(sizes))
    groups = getattr(dense, "groups", 1)
    for spectrum, size in zip(spectra, sizes, strict=False):
        assert spectrum.values.dtype == torch.float64
        assert len(spectrum.values) == min(spectrum.shape) == size
        assert math.isclose(
            float(spectrum.values.square().sum()) * groups, float(dense.weight.detach().square().sum()), rel_tol=1e-9
        )
        assert (spectrum.values.diff() <= 0).all()


def test_balanced_factors():
    dense, _ = example_of(nn.Conv2d, dtype=torch.float64)
    built = layers.LowRankConv2d.from_dense(dense, rank=3)
    for group in range(2):
        down = built.down.weight.view(2, 3, -1)[group]
        up = built.up.weight.view(2, 6, 3)[group]
        torch.testing.assert_close(down @ down.T, up.T @ up)
    tucker = layers.TuckerConv2d.from_dense(nn.Conv2d(16, 16, 3), rank=(8, 8))
    sizes = [
        float(w.detach().flatten(1).svd().S.square().mean().sqrt()) for w in (tucker.down.weight, tucker.core.weight)
    ]
    assert max(sizes) < 2 * min(sizes)
