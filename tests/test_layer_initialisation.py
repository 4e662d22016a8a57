"""Does a layer from scratch begin as its dense twin does: the same output variance, sane activations inside?"""

import math

import pytest
import torch
from cases import AXES, FORM_IDS, FORMS, dense_layers, form_name, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold import layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the dense layer
forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
# the values of an SVD form are in the weight of its first stage, which is therefore not called as a module
CHAINS = [form for form in FORMS if form[0].method != "svd_form"]
DRAWS = 16
SHARES = {"smallest": 0.0, "half": 0.5, "full": 1.0}


def dense_layer(kind, groups, bias):
    if kind is nn.Linear:
        return nn.Linear(24, 16, bias=bias)
    if kind is nn.Embedding:
        return nn.Embedding(40, 12, padding_idx=0)
    return kind(8, 12, (3, 2, 3)[: AXES[kind]], groups=groups, bias=bias)


def sample(dense):
    if isinstance(dense, nn.Embedding):
        return torch.arange(40)
    size = (64, 24) if isinstance(dense, nn.Linear) else (8, 8, *(6,) * AXES[type(dense)])
    return torch.randn(size)


def mean_square(layer, x, draws=DRAWS):
    """The mean square of the output over fresh weights."""
    total = 0.0
    with torch.no_grad():
        for _ in range(draws):
            layer.reset_parameters()
            total += float(layer(x).square().mean())
    return total / draws


@forms
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize(("groups", "bias"), [(1, True), (4, False)])
def test_output_variance_is_the_dense_layers(layer, options, share, groups, bias):
    dense = dense_layer(layer.dense_type, groups, bias)
    rank, x = part_of(layer.full_rank(dense, **options), share), sample(dense)
    built = layer.like(dense, rank=rank, **options)
    assert mean_square(built, x) == pytest.approx(mean_square(dense, x), rel=0.2)


@pytest.mark.parametrize(("layer", "options"), CHAINS, ids=map(form_name, CHAINS))
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_activations_inside_stay_near_one(layer, options, share):
    """Half precision and gradients suffer where a chain shrinks in one stage what it blows up in another."""
    dense = dense_layer(layer.dense_type, 1, False)
    built = layer.like(dense, rank=part_of(layer.full_rank(dense, **options), share), **options)
    stages = [stage for stage in built.modules() if type(stage) in (nn.Linear, nn.Embedding, *AXES)]
    seen = []
    for stage in stages:
        stage.register_forward_hook(lambda _m, _i, output: seen.append(float(output.detach().square().mean().sqrt())))
    built(sample(dense))
    assert len(seen) == len(stages)
    assert all(0.1 < size < 3 for size in seen), seen


EXTREME = {
    "one to one": nn.Linear(1, 1),
    "narrow": nn.Linear(512, 3),
    "wide": nn.Linear(3, 512),
    "primes": nn.Linear(97, 101, bias=False),
    "pointwise": nn.Conv2d(16, 32, 1),
    "stem": nn.Conv2d(3, 64, 7, stride=2),
    "groups": nn.Conv2d(16, 16, 3, groups=4),
    "depthwise": nn.Conv2d(16, 16, 3, groups=16),
    "one axis": nn.Conv2d(13, 17, (1, 5)),
    "primes in time": nn.Conv1d(7, 11, 9),
    "space": nn.Conv3d(5, 7, 3),
    "table of primes": nn.Embedding(1009, 13),
    "short table": nn.Embedding(7, 64),
    "padded table": nn.Embedding(50, 16, padding_idx=3),
}


@pytest.mark.parametrize("case", EXTREME)
def test_output_variance_at_extreme_shapes_and_ranks(case):
    dense = EXTREME[case]
    x = extreme_sample(dense)
    expected = mean_square(dense, x, draws=40)
    for layer, options in FORMS:
        if layer.dense_type is type(dense):
            full = layer.full_rank(dense, **options)
            for rank in {part_of(full, 0), full}:
                built = layer.like(dense, rank=rank, **options)
                assert mean_square(built, x, draws=40) == pytest.approx(expected, rel=0.2), (layer, options, rank)


def extreme_sample(dense):
    if isinstance(dense, nn.Embedding):
        return torch.arange(dense.num_embeddings)
    if isinstance(dense, nn.Linear):
        return torch.randn(512, dense.in_features)
    return torch.randn(4, dense.in_channels, *(12,) * AXES[type(dense)])


@forms
@given(data=st.data(), share=st.floats(0, 1))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_every_draw_has_the_norm_that_gives_this_variance(layer, options, data, share):
    """White input gives the output variance ||weight||² / out, which is 1/3 in a fresh dense layer, 1 of a table."""
    dense, _ = data.draw(dense_layers(layer.dense_type))
    rank = part_of(layer.full_rank(dense, **options), share)
    built = layer.like(dense, rank=rank, seed=data.draw(st.integers(0, 100)), **options)
    rows, *fan_in = dense.weight.shape
    expected = rows / 3
    if layer.dense_type is nn.Embedding:
        expected = (rows - (dense.padding_idx is not None)) * math.prod(fan_in)
    assert float(built.weight.detach().square().sum()) == pytest.approx(expected, rel=1e-6)


def test_the_bias_is_torchs():
    torch.manual_seed(0)
    layer = layers.CPConv2d(400, 4000, 3, groups=100, rank=1)
    bound = 1 / math.sqrt(4 * 9)
    assert float(layer.bias.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(layer.bias.detach().square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)


def test_the_padding_row_begins_as_zero():
    layer = layers.LowRankEmbedding(10, 4, padding_idx=-2, rank=2)
    assert layer.padding_idx == 8
    assert not layer.weight[8].any()
    assert layer.weight[7].any()


@pytest.mark.parametrize("layer", [layers.LowRankLinear(9, 5, rank=2), layers.TuckerConv2d(6, 6, 3, rank=(2, 3))])
def test_reset_parameters_draws_anew(layer):
    before, norm = layer.weight.detach().clone(), float(layer.squared_norm().detach())
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert not torch.equal(layer.weight, before)
    assert float(layer.squared_norm().detach()) == pytest.approx(norm, rel=1e-4)
