"""Do tensor-train layers compute what their dense layer computes, in every order, without ever building it?"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.errors import LayerError
from rankfold.layers import Call, TTConv1d, TTConv2d, TTConv3d, TTEmbedding, TTLinear
from rankfold.layers.tensor._tt_contract import contract
from rankfold.layers.tensor._tt_conv_schedule import ConvSchedule, schedule_conv
from rankfold.layers.tensor._tt_order import BATCHES, Chain, bucket, schedule_sweep

few = settings(max_examples=20, deadline=None, derandomize=True)
F64 = torch.float64
SHAPES = [  # in, out, in_shape, out_shape: exact, primes padded, long, modes of one
    (12, 20, (3, 4), (4, 5)),
    (11, 17, (3, 4), (3, 6)),
    (23, 7, (2, 3, 4), (2, 2, 2)),
    (36, 16, (2, 3, 3, 2), (2, 2, 2, 2)),
    (30, 8, (1, 5, 6), (2, 4, 1)),
]


class Largest(TorchDispatchMode):
    """Watches the size of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.untyped_storage().nbytes() // value.element_size())
        return result


def gradients(layer, output, seed=0):
    seen = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    return torch.autograd.grad((output * seen).sum(), list(layer.parameters()))


def agrees_with_its_weight(layer, x, dense_forward):
    """Forward and the gradient of every parameter, against the dense operation on the rebuilt weight."""
    actual, expected = layer(x), dense_forward(layer.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(gradients(layer, actual), gradients(layer, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs", "in_shape", "out_shape"), SHAPES)
@given(cap=st.integers(1, 9), rows=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (70,)]), bias=st.booleans())
@few
def test_linear_equals_its_dense_layer(inputs, outputs, in_shape, out_shape, cap, rows, bias):
    full = TTLinear.full_rank(nn.Linear(inputs, outputs), in_shape=in_shape, out_shape=out_shape)
    shapes = {"in_shape": in_shape, "out_shape": out_shape}
    layer = TTLinear(inputs, outputs, bias, dtype=F64, rank=min(cap, full), **shapes)
    x = torch.randn(*rows, inputs, dtype=F64)
    agrees_with_its_weight(layer, x, lambda weight: nn.functional.linear(x, weight, layer.bias))
    dense = layer.to_dense()
    torch.testing.assert_close(dense(x), layer(x))
    assert (dense.bias is not None) == bias


@given(st.data())
@few
def test_the_schedule_is_the_cheapest_and_counts_its_products(data):
    order = data.draw(st.integers(2, 4))
    dims = st.lists(st.integers(1, 9), min_size=order, max_size=order).map(tuple)
    ranks = data.draw(st.lists(st.integers(1, 9), min_size=order - 1, max_size=order - 1))
    chain = Chain(data.draw(dims), data.draw(dims), (1, *ranks, 1))
    rows = data.draw(st.sampled_from([1, 4, 64]))
    schedule = schedule_sweep(chain, rows)
    assert [group[0] for group in schedule.groups[1:]] == [group[1] for group in schedule.groups[:-1]]
    assert (schedule.groups[0][0], schedule.groups[-1][1]) == (0, order)
    cores = [torch.randn(shape) for shape in chain.shapes]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        contract(torch.randn(rows, math.prod(chain.in_shape), 1), cores, schedule)
    assert counter.get_total_flops() == 2 * schedule.macs(rows)


def test_large_batches_merge_and_the_last_schedule_serves_symbols():
    chain = Chain((8,) * 4, (8,) * 4, (1, 8, 8, 8, 1))
    assert len(schedule_sweep(chain, 1024).groups) < 4
    assert bucket(1) == 0
    assert bucket(2) == bucket(4) == 1
    assert bucket(10**9) == len(BATCHES) - 1
    wide = Chain((8,) * 6, (4, 4, 4, 4, 4, 3), (1, *(8,) * 5, 1))
    for rows in BATCHES:
        assert all(wide.core(*group) <= 2**24 for group in schedule_sweep(wide, rows).groups)


@pytest.mark.parametrize(("rank", "params"), [(1, 144), (2, 528), (4, 2016)])
def test_the_vgg_layer_of_novikov_has_the_published_size(rank, params):
    shapes = {"in_shape": (2, 7, 8, 8, 7, 4), "out_shape": (4,) * 6}
    layer = TTLinear(25088, 4096, bias=False, rank=rank, **shapes)
    assert sum(p.numel() for p in layer.parameters()) == params
    dense = nn.Linear(25088, 4096, bias=False, device="meta")
    assert TTLinear.cost(dense, [], rank=rank, **shapes).params == params
    assert layer(torch.ones(2, 25088)).shape == (2, 4096)


CONVOLUTIONS = [
    (TTConv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (9,)),
    (TTConv2d, {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)}, (7, 8)),
    (TTConv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False}, (7, 8)),
    (TTConv2d, {"kernel_size": 1}, (5, 5)),
    (TTConv3d, {"kernel_size": 2, "stride": (1, 2, 1), "padding": 1, "padding_mode": "circular"}, (4, 5, 4)),
]


@pytest.mark.parametrize("rebuilt", [True, False], ids=["rebuilt", "swept"])
@pytest.mark.parametrize(("kind", "arguments", "size"), CONVOLUTIONS)
@given(
    cap=st.integers(1, 6), batch=st.sampled_from([(), (1,), (3,)]), channels=st.sampled_from([(6, 8), (7, 5), (1, 3)])
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_convolution_equals_its_dense_layer_both_ways(kind, arguments, size, rebuilt, cap, batch, channels):
    dense = kind.dense_type(*channels, **arguments, device="meta")
    layer = kind(*channels, **arguments, dtype=F64, rank=min(cap, kind.full_rank(dense)))
    sweep = (
        None
        if rebuilt
        else schedule_sweep(
            Chain(layer._chain.out_shape[1:], layer._chain.in_shape[1:], layer._chain.ranks[1:]), 8, both_ends=False
        )
    )
    schedules = (ConvSchedule(sweep, 0, 0),) * len(BATCHES)
    layer._schedules = {False: schedules, True: schedules}
    x = torch.randn(*batch, channels[0], *size, dtype=F64)
    shell = layer.to_dense()
    values = {} if layer.bias is None else {"bias": layer.bias}
    agrees_with_its_weight(
        layer, x, lambda weight: torch.func.functional_call(shell, {"weight": weight, **values}, (x,))
    )


def test_convolution_chooses_by_cost_and_counts_it():
    thin = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    call = Call((8, 256, 28, 28), (8, 256, 28, 28))
    dense = 8 * 28 * 28 * 256 * 256 * 9
    assert TTConv2d.cost(thin, [call], rank=1).macs < dense / 20  # the sweep
    rebuilt = TTConv2d.cost(thin, [call], rank=TTConv2d.full_rank(thin)).macs
    assert dense < rebuilt < 1.4 * dense
    grouped = Chain((9, 4, 4), (1, 2, 2), (1, 2, 2, 1))
    assert schedule_conv(grouped, (16, 4), 4, 4096).sweep is None


@pytest.mark.parametrize(("kind", "rank", "rebuilt"), [(TTConv2d, 1, False), (TTConv2d, 9, True)])
@pytest.mark.parametrize("training", [False, True])
def test_the_schedule_of_a_convolution_is_what_it_does(kind, rank, rebuilt, training):
    layer = kind(96, 96, 3, padding=1, rank=rank)
    x = torch.randn(3, 96, 24, 24, requires_grad=training)
    schedule = layer.schedule(x.shape, training)
    assert schedule.rebuilt == rebuilt
    assert schedule.rows == 3 * 24 * 24
    with (
        torch.set_grad_enabled(training),
        Largest() as largest,
        torch.utils.flop_counter.FlopCounterMode(display=False) as counter,
    ):
        output = layer(x)
    assert counter.get_total_flops() == 2 * schedule.macs
    assert 4 * largest.entries <= max(schedule.peak, 4 * output.numel(), 4 * x.numel())


def test_the_tt_convolution_of_garipov_has_its_size():
    layer = TTConv2d(64, 64, 3, bias=False, rank=(9, 20, 16), in_shape=(4, 4, 4), out_shape=(4, 4, 4))
    assert sum(p.numel() for p in layer.parameters()) == 9 * 9 + 16 * (9 * 20 + 20 * 16 + 16)


@given(cap=st.integers(1, 5), order=st.sampled_from([2, 3]), shape=st.sampled_from([(1,), (7,), (3, 4), (0,), ()]))
@few
def test_embedding_equals_its_table(cap, order, shape):
    shapes = (
        {"in_shape": (5, 5), "out_shape": (3, 2)} if order == 2 else {"in_shape": (3, 3, 3), "out_shape": (2, 2, 2)}
    )
    layer = TTEmbedding(23, 6, dtype=F64, rank=cap, **shapes)
    index = torch.randint(23, shape, generator=torch.Generator().manual_seed(cap))
    agrees_with_its_weight(layer, index, lambda table: nn.functional.embedding(index, table))


def test_embedding_computes_duplicates_once(monkeypatch):
    layer = TTEmbedding(1000, 16, rank=4)
    seen = []
    rows = TTEmbedding._rows
    monkeypatch.setattr(TTEmbedding, "_rows", lambda self, index: seen.append(len(index)) or rows(self, index))
    index = torch.tensor([[5, 5, 5], [900, 5, 7]])
    output = layer(index)
    assert seen == [3]
    torch.testing.assert_close(output, layer.weight[index])


def test_embedding_never_builds_its_table():
    layer = TTEmbedding(1_000_000, 64, rank=8)
    with Largest() as largest:
        layer(torch.randint(1_000_000, (128,))).sum().backward()
    assert largest.entries < 1_000_000


def test_embedding_keeps_its_padding_row_at_zero():
    dense = nn.Embedding(20, 6, padding_idx=-2, dtype=F64)
    for layer in (TTEmbedding.from_dense(dense, rank=2), TTEmbedding.like(dense, rank=2)):
        assert layer.padding_idx == 18
        assert not layer(torch.tensor([18, 18])).any()
        assert not layer.weight[18].any()
        assert layer.to_dense().padding_idx == 18
        torch.testing.assert_close(layer.squared_norm(), layer.weight.square().sum())
        layer(torch.tensor([18, 18])).sum().backward()
        assert not any(core.grad.any() for core in layer.cores)


@pytest.mark.parametrize("index", [-1, 20, 24])
def test_embedding_refuses_an_index_out_of_range(index):
    with pytest.raises(IndexError):
        TTEmbedding(20, 6, rank=2, in_shape=(5, 5), out_shape=(2, 3))(torch.tensor([3, index]))


BAD = [
    (lambda: TTLinear(12, 12, rank=0), "rank=0"),
    (lambda: TTLinear(12, 12, rank=999), "full rank"),
    (lambda: TTLinear(12, 12, rank=2.0), "rank=2.0"),
    (lambda: TTLinear(12, 12, rank=(2, 2)), r"rank=\(2, 2\)"),
    (lambda: TTLinear(16, 16, rank=(1, 8), in_shape=(2, 2, 4), out_shape=(1, 2, 8)), "cannot be filled"),
    (lambda: TTLinear(12, 12, rank=2, in_shape=(3, 3), out_shape=(3, 4)), "does not cover 12"),
    (lambda: TTLinear(12, 12, rank=2, in_shape=(3, 4), out_shape=(3, 2, 2)), "as many dims"),
    (lambda: TTLinear(12, 12, rank=2, in_shape=(12,), out_shape=(12,)), "two cores"),
    (lambda: TTLinear(12, 12, rank=2, in_shape=(3.0, 4)), "positive ints"),
    (lambda: TTEmbedding(12, 4, max_norm=1.0, rank=2), "max_norm"),
    (lambda: TTEmbedding(12, 4, sparse=True, rank=2), "sparse"),
    (lambda: TTEmbedding(12, 4, scale_grad_by_freq=True, rank=2), "scale_grad_by_freq"),
    (lambda: TTEmbedding(12, 4, padding_idx=12, rank=2), "padding_idx=12"),
    (lambda: TTEmbedding.from_dense(nn.Embedding(12, 4, sparse=True), rank=2), "sparse"),
    (lambda: TTEmbedding.from_dense(nn.Embedding(9, 4, 0, _weight=torch.ones(9, 4)), rank=2), "padding_idx=0"),
    (lambda: TTLinear.from_dense(nn.Embedding(12, 4), rank=2), "nn.Linear"),
    (lambda: TTConv2d.from_dense(nn.Conv1d(4, 4, 1), rank=1), "nn.Conv2d"),
    (lambda: TTLinear.from_dense(nn.Linear(4, 4, device="meta"), rank=1), "meta device"),
    (lambda: TTLinear.rank_grid(nn.Linear(4, 4), multiple=0), "multiple must be a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(LayerError, match=message):
        call()


def test_weights_with_nan_are_refused():
    dense = nn.Linear(12, 12)
    with torch.no_grad():
        dense.weight[0, 0] = float("nan")
    with pytest.raises(LayerError, match="NaN"):
        TTLinear.from_dense(dense, rank=2)
    with pytest.raises(TypeError):
        TTLinear.from_dense(nn.Linear(12, 12), rank=2, split="channel")


ONE_OF_EACH = [
    (lambda: TTLinear(60, 37, rank=4, in_shape=(4, 4, 4), out_shape=(4, 3, 4)), torch.randn(3, 5, 60)),
    (lambda: TTConv2d(12, 10, 3, padding=1, rank=2), torch.randn(2, 12, 20, 20)),
    (lambda: TTEmbedding(97, 24, padding_idx=1, rank=3), torch.randint(97, (4, 6))),
]


@pytest.mark.parametrize(("make", "x"), ONE_OF_EACH)
def test_exports_as_plain_products(make, x):
    layer = make().eval()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert not any("einsum" in str(node.target) for node in program.graph.nodes)


def test_exports_with_a_batch_of_any_size():
    layer = TTLinear(60, 37, rank=4).eval()
    program = torch.export.export(layer, (torch.randn(4, 60),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for rows in (2, 9, 700):
        x = torch.randn(rows, 60)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "x"), ONE_OF_EACH)
def test_compiles_to_one_graph(make, x):
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    more = torch.cat([x, x, x])
    torch.testing.assert_close(compiled(more), layer(more))


@pytest.mark.parametrize(("make", "x"), ONE_OF_EACH)
def test_the_same_seed_gives_the_same_layer(make, x):
    dense = make().to_dense()
    kind = type(make())
    state = torch.get_rng_state()
    one, same, other = (kind.like(dense, rank=2, seed=seed) for seed in (3, 3, 4))
    decomposed = [kind.from_dense(dense, rank=2, seed=seed) for seed in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*(layer.parameters() for layer in decomposed), strict=True))
    again = copy.deepcopy(one)
    torch.testing.assert_close(again(x), one(x))


FRESH = [
    (TTLinear, nn.Linear(96, 250, bias=False), (3000, 96)),
    (TTLinear, nn.Linear(101, 53, bias=False), (3000, 101)),
    (TTConv2d, nn.Conv2d(31, 40, 3, bias=False), (20, 31, 20, 20)),
    (TTConv1d, nn.Conv1d(16, 64, 5, bias=False), (40, 16, 100)),
    (TTEmbedding, nn.Embedding(301, 40), None),
]


@pytest.mark.parametrize(("kind", "dense", "size"), FRESH)
def test_a_fresh_layer_has_the_output_variance_of_the_dense_one(kind, dense, size):
    x = torch.arange(dense.weight.shape[0]) if size is None else torch.randn(size)
    expected = 1.0 if size is None else 1 / 3
    for options in ({}, *kind.variants(dense)):
        for rank in {1, 2, *kind.rank_grid(dense, **options)[-1:]}:
            layer = kind.like(dense, rank=rank, seed=rank, **options)
            with torch.no_grad():
                assert float(layer(x).square().mean()) == pytest.approx(expected, rel=0.2)
    assert kind.like(dense, rank=1, device="meta").cores[0].is_meta


@pytest.mark.parametrize(("make", "x"), ONE_OF_EACH)
def test_costs_grow_with_the_rank_and_errors_fall(make, x):
    layer = make()
    kind, dense = type(layer), layer.to_dense()
    nn.init.normal_(dense.weight)
    if getattr(dense, "padding_idx", None) is not None:
        dense = nn.Embedding(dense.num_embeddings, dense.embedding_dim)
    for options in kind.variants(dense):
        grid = kind.rank_grid(dense, **options)
        costs = [kind.cost(dense, [Call(tuple(x.shape), tuple(layer(x).shape))], rank=rank, **options) for rank in grid]
        params = [cost.params for cost in costs]
        assert params == sorted(params)
        assert params[-1] < sum(p.numel() for p in dense.parameters())
        built = [kind.from_dense(dense, rank=rank, **options) for rank in grid]
        assert params == [sum(p.numel() for p in layer.parameters()) for layer in built]
        errors = kind.errors(dense, grid, **options)
        assert list(errors) == sorted(errors, reverse=True)
        for error, factorised in zip(errors, built, strict=True):
            actual = float((factorised.weight - dense.weight).detach().norm() / dense.weight.detach().norm())
            assert error == pytest.approx(actual, rel=0.02, abs=1e-6)  # one is rounded, the other decomposed anew
    assert kind.spectra(dense) == ()


def test_from_dense_keeps_what_the_layer_was():
    dense = nn.Linear(12, 20, dtype=torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    layer = TTLinear.from_dense(dense, rank=3)
    assert layer.cores[0].dtype == torch.bfloat16
    assert not layer.training
    assert not any(core.requires_grad for core in layer.cores)
    assert layer.bias.requires_grad
    assert torch.equal(layer.bias, dense.bias)
    assert layer.options == {"in_shape": (3, 4), "out_shape": (4, 5)}
    assert TTLinear.like(dense, rank=layer.rank, **layer.options).rank == 3
    norms = [float(core.double().norm()) for core in layer.cores]
    assert norms == pytest.approx([norms[0]] * 2, rel=0.02)
    assert "rank=3" in repr(layer)


REDUNDANT = [  # the published nets of Garipov et al. (2016): bonds beyond what the modes can use
    (TTLinear, (8192, 1536), {"in_shape": (8, 8, 8, 16), "out_shape": (4, 6, 8, 8)}, 40, (40, 40, 40)),
    (TTLinear, (1536, 512), {"in_shape": (4, 6, 8, 8), "out_shape": (4, 4, 4, 8)}, 30, (30, 30, 30)),
    (TTConv2d, (64, 64, 3), {"in_shape": (4, 4, 4), "out_shape": (4, 4, 4)}, (20, 20, 20), (20, 20, 20)),
]


@pytest.mark.parametrize(("kind", "sizes", "shapes", "rank", "bonds"), REDUNDANT)
def test_redundant_bonds_are_allowed_for_training_from_scratch(kind, sizes, shapes, rank, bonds):
    layer = kind(*sizes, bias=False, rank=rank, redundant=True, **shapes)
    assert layer._chain.ranks == (1, *bonds, 1)
    assert float(layer.squared_norm().detach()) == pytest.approx(sizes[1] / 3, rel=1e-3)
    dense = kind.dense_type(*sizes, bias=False)
    params = kind.cost(dense, [], rank=rank, redundant=True, **shapes).params
    assert params == sum(p.numel() for p in layer.parameters())
    assert kind.like(dense, rank=rank, **layer.options)._chain == layer._chain


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TTConv2d(64, 64, 3, rank=(20, 20, 20)), "rank"),
        (lambda: TTConv2d.from_dense(nn.Conv2d(16, 16, 3), rank=20, redundant=True), "start, and stay, at zero"),
        (lambda: TTLinear.errors(nn.Linear(16, 16), [17], redundant=True), "start, and stay, at zero"),
        (lambda: TTLinear(16, 16, rank=(0,), redundant=True), r"rank=\(0,\)"),
        (lambda: TTLinear(16, 16, rank=(2, 2), redundant=True), r"rank=\(2, 2\)"),
        (lambda: TTLinear(16, 16, rank=2.5, redundant=True), "rank=2.5"),
        (lambda: TTLinear(16, 16, rank=2, redundant=1), "redundant=1"),
    ],
)
def test_bonds_that_no_weight_fills_are_refused(call, message):
    with pytest.raises(LayerError, match=message):
        call()


def test_redundant_bonds_within_reach_are_decomposed():
    dense = nn.Linear(16, 16, dtype=F64)
    layer = TTLinear.from_dense(dense, rank=16, redundant=True)
    torch.testing.assert_close(layer.weight, dense.weight)
