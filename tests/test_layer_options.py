"""Is everything about the dense layer kept: stride, groups, padding, bias, dtype, device, mode, requires_grad?"""

import copy
import io

import pytest
import torch
from cases import BIASED, FORM_IDS, FORMS, example_of, form_name, part_of, small_rank
from torch import nn

from rankfold import layers
from rankfold.errors import LayerError

forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
biased = pytest.mark.parametrize(("layer", "options"), BIASED, ids=map(form_name, BIASED))
KEPT = {
    nn.Linear: ("in_features", "out_features"),
    nn.Embedding: nn.Embedding.__constants__,
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], nn.Conv2d.__constants__),
}


def build(layer, options, **changes):
    dense, x = example_of(layer.dense_type, **changes)
    return dense, x, layer.from_dense(dense, rank=layer.full_rank(dense, **options), **options)


@forms
def test_attributes_of_the_dense_layer(layer, options):
    dense, x, built = build(layer, options)
    for name in KEPT[layer.dense_type]:
        assert getattr(built, name) == getattr(dense, name), name
        assert getattr(built.to_dense(), name) == getattr(dense, name), name
    assert built(x).shape == dense(x).shape
    assert isinstance(built, layers.FactorisedLayer)


@biased
def test_without_bias(layer, options):
    dense, x, built = build(layer, options, bias=False)
    assert built.bias is None
    assert built.to_dense().bias is None
    assert "bias=False" in built.extra_repr()
    assert built(x).shape == dense(x).shape


@biased
def test_with_bias(layer, options):
    dense, _, built = build(layer, options)
    torch.testing.assert_close(built.bias, dense.bias, rtol=0, atol=0)
    assert built.bias.data_ptr() != dense.bias.data_ptr()


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype(layer, options, dtype):
    dense, x, built = build(layer, options, dtype=dtype)
    for twin in (built, layer.like(dense, rank=built.rank, **options), built.to_dense()):
        assert {p.dtype for p in twin.parameters()} == {dtype}
    assert built(x).dtype == dense(x).dtype


@forms
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
def test_mode_and_requires_grad(layer, options, training, weight, bias):
    dense, _ = example_of(layer.dense_type)
    dense.train(training)
    dense.weight.requires_grad_(weight)
    if getattr(dense, "bias", None) is not None:
        dense.bias.requires_grad_(bias)
    rank = layer.full_rank(dense, **options)
    built = layer.from_dense(dense, rank=rank, **options)
    for twin in (built, layer.like(dense, rank=rank, **options), built.to_dense()):
        assert all(module.training is training for module in twin.modules())
        for name, parameter in twin.named_parameters():
            assert parameter.requires_grad is (bias if name.endswith("bias") else weight), name


@forms
def test_shares_nothing_with_the_dense_layer(layer, options):
    dense, x = example_of(layer.dense_type)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    built = layer.from_dense(dense, rank=layer.full_rank(dense, **options), **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in [*built.parameters(), *built.to_dense().parameters()]:
            parameter.normal_()
    torch.testing.assert_close(dict(dense.state_dict()), before, rtol=0, atol=0)


@forms
def test_the_meta_device_allocates_nothing(layer, options):
    dense, _ = example_of(layer.dense_type, device="meta")
    rank = small_rank(layer, dense, options)
    for source in (dense, example_of(layer.dense_type)[0]):
        built = layer.like(source, rank=rank, device="meta", **options)
        assert all(p.is_meta for p in [*built.parameters(), *built.buffers()])
    assert built.weight.shape == dense.weight.shape
    on_cpu = layer.like(dense, rank=rank, device="cpu", **options)
    assert {p.device.type for p in on_cpu.parameters()} == {"cpu"}
    with torch.device("meta"):
        assert next(layer.like(dense, rank=rank, **options).parameters()).is_meta


@forms
def test_rank_and_options_describe_the_layer(layer, options):
    dense, _, built = build(layer, options)
    twin = layer.like(dense, rank=built.rank, **built.options)
    shapes = {name: value.shape for name, value in built.state_dict().items()}
    assert {name: value.shape for name, value in twin.state_dict().items()} == shapes
    assert options.items() <= built.options.items()
    assert str(built.rank) in built.extra_repr()
    with pytest.raises(TypeError):
        layer.from_dense(dense, rank=built.rank, unknown=1)
    with pytest.raises(TypeError):
        layer.cost(dense, [], rank=built.rank, unknown=1)


@forms
def test_seeds(layer, options):
    dense, _ = example_of(layer.dense_type)
    rank = small_rank(layer, dense, options)
    state = torch.get_rng_state()
    one, same, other = (layer.like(dense, rank=rank, seed=seed, **options).state_dict() for seed in (1, 1, 2))
    least = part_of(layer.full_rank(dense, **options), 0)
    factors = [layer.from_dense(dense, rank=least, seed=1, **options).state_dict() for _ in range(2)]
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    torch.testing.assert_close(*factors, rtol=0, atol=0)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_the_constructor_uses_the_global_generator():
    twins = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        twins.append(layers.CPConv2d(6, 6, 3, rank=2).weight)
    torch.testing.assert_close(twins[0], twins[1], rtol=0, atol=0)
    assert not torch.equal(twins[0], twins[2])


@forms
def test_copies_pickles_and_state_dicts(layer, options):
    dense, x, built = build(layer, options)
    file = io.BytesIO()
    torch.save(built, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    fresh = layer.like(dense, rank=built.rank, seed=3, **options)
    fresh.load_state_dict(built.state_dict())
    for twin in (copy.deepcopy(built), loaded, fresh):
        torch.testing.assert_close(twin(x), built(x), rtol=0, atol=0)


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
