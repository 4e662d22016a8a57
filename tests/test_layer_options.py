"""What can layers not keep, and refuse by name? What they keep is in test_conformity.py."""

import io

import pytest
import torch
from cases import BIASED, FORM_IDS, FORMS, example_of, form_name, small_rank
from torch import nn

from rankfold import layers
from rankfold.errors import LayerError

forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
biased = pytest.mark.parametrize(("layer", "options"), BIASED, ids=map(form_name, BIASED))


def build(layer, options, **changes):
    dense, x = example_of(layer.dense_type, **changes)
    return dense, x, layer.from_dense(dense, rank=layer.full_rank(dense, **options), **options)


@biased
def test_without_bias(layer, options):
    dense, x, built = build(layer, options, bias=False)
    assert built.bias is None
    assert built.to_dense().bias is None
    assert "bias=False" in built.extra_repr()
    assert built(x).shape == dense(x).shape


@forms
def test_a_repr_says_the_rank(layer, options):
    _, _, built = build(layer, options)
    assert str(built.rank) in built.extra_repr()


@forms
def test_pickles(layer, options):
    _, x, built = build(layer, options)
    file = io.BytesIO()
    torch.save(built, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), built(x), rtol=0, atol=0)


def test_the_constructor_uses_the_global_generator():
    twins = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        twins.append(layers.CPConv2d(6, 6, 3, rank=2).weight)
    torch.testing.assert_close(twins[0], twins[1], rtol=0, atol=0)
    assert not torch.equal(twins[0], twins[2])


@forms
def test_export_autocast_and_no_grad(layer, options):
    _, x, built = build(layer, options)
    program = torch.export.export(built, (x,))
    torch.testing.assert_close(program.module()(x), built(x))
    with torch.no_grad():
        assert not built(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = built(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), built(x), rtol=0.1, atol=0.1)


@forms
@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "full", (), (1,) * 9, None])
def test_bad_ranks_are_named(layer, options, rank):
    dense, _ = example_of(layer.dense_type)
    full = layer.full_rank(dense, **options)
    ask = [
        lambda: layer.from_dense(dense, rank=rank, **options),
        lambda: layer.like(dense, rank=rank, **options),
        lambda: layer.cost(dense, [], rank=rank, **options),
        lambda: layer.errors(dense, [rank], **options),
    ]
    for call in ask:
        with pytest.raises(LayerError) as error:
            call()
        assert layer.__name__ in str(error.value)
        assert repr(rank) in str(error.value)
        assert str(full) in str(error.value)


@forms
def test_rank_beyond_full(layer, options):
    dense, _ = example_of(layer.dense_type)
    full = layer.full_rank(dense, **options)
    beyond = tuple(r + 1 for r in full) if isinstance(full, tuple) else full + 1
    with pytest.raises(LayerError, match="full rank"):
        layer.from_dense(dense, rank=beyond, **options)
    layer.from_dense(dense, rank=full, **options)


def test_bad_options_are_named():
    with pytest.raises(LayerError, match="split must be 'channel' or 'spatial', got 'diagonal'"):
        layers.LowRankConv2d(4, 4, 3, rank=1, split="diagonal")
    with pytest.raises(LayerError, match="1-D"):
        layers.LowRankConv1d(4, 4, 3, rank=1, split="spatial")
    with pytest.raises(LayerError, match="max_norm=1.0"):
        layers.LowRankEmbedding(4, 4, max_norm=1.0, rank=1)
    with pytest.raises(LayerError, match="bias"):
        layers.LowRankEmbedding(4, 4, rank=1).tied_head(bias=torch.zeros(5))
    with pytest.raises(ValueError, match="divisible"):
        layers.CPConv2d(4, 4, 3, groups=3, rank=1)
    with pytest.raises(ValueError, match="strided"):
        layers.TuckerConv2d(4, 4, 3, stride=2, padding="same", rank=(1, 1))


@forms
def test_only_the_dense_twin_is_decomposed(layer, options):
    dense, _ = example_of(layer.dense_type)
    rank = layer.full_rank(dense, **options)
    other = nn.BatchNorm1d(3)
    for call in (layer.from_dense, layer.like):
        with pytest.raises(LayerError, match="BatchNorm1d"):
            call(other, rank=rank, **options)


@forms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(layer, options, value):
    dense, _ = example_of(layer.dense_type)
    rank = small_rank(layer, dense, options)
    with torch.no_grad():
        dense.weight.view(-1)[1] = value
    for call in (lambda: layer.from_dense(dense, rank=rank, **options), lambda: layer.errors(dense, [rank], **options)):
        with pytest.raises(LayerError, match="NaN or Inf"):
            call()


@forms
def test_a_meta_weight_is_not_decomposed(layer, options):
    dense, _ = example_of(layer.dense_type, device="meta")
    with pytest.raises(LayerError, match="meta"):
        layer.from_dense(dense, rank=small_rank(layer, dense, options), **options)
