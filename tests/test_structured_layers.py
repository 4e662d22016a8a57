"""Do block trains, Kronecker sums and rings compute what their dense layer computes, at the cost they state?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from rankfold import layers
from rankfold.decompose import rearranged, singular_values
from rankfold.errors import LayerError
from rankfold.layers import BTTLinear, Call, KroneckerLinear, TRLinear
from rankfold.layers.tensor._ring import _core_shapes, _cut_after, _rebuilt
from rankfold.layers.tensor._structured import boxes
from rankfold.layers.tensor._tt_order import BATCHES as PLANNED

F64 = torch.float64
few = settings(max_examples=6, deadline=None, derandomize=True)
KINDS = (BTTLinear, KroneckerLinear, TRLinear)
kinds = pytest.mark.parametrize("kind", KINDS)
SHAPES = [  # in, out, in_shape, out_shape: exact, primes padded, dims of one, padded by whole blocks, three, four
    (12, 20, (3, 4), (4, 5)),
    (11, 17, (3, 4), (3, 6)),
    (30, 8, (1, 30), (8, 1)),
    (7, 9, (4, 4), (5, 3)),
    (23, 7, (2, 3, 4), (2, 2, 2)),
    (36, 16, (2, 3, 3, 2), (2, 2, 2, 2)),
]
CASES = [(kind, *shape) for kind in KINDS for shape in SHAPES if kind is TRLinear or len(shape[2]) == 2]
BATCHES = ((), (0,), (1,), (5,), (2, 3), (40,), (300,))


def gradients(layer, output, seed=0):
    seen = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    return torch.autograd.grad((output * seen).sum(), list(layer.parameters()))


@pytest.mark.parametrize(("kind", "inputs", "outputs", "in_shape", "out_shape"), CASES)
@given(share=st.floats(0, 1), rows=st.sampled_from(BATCHES), bias=st.booleans())
@few
def test_forward_and_gradients_are_those_of_the_dense_layer(
    kind, inputs, outputs, in_shape, out_shape, share, rows, bias
):
    shapes = {"in_shape": in_shape, "out_shape": out_shape}
    full = kind.full_rank(nn.Linear(inputs, outputs), **shapes)
    layer = kind(inputs, outputs, bias, dtype=F64, rank=max(1, round(share * full)), **shapes)
    x = torch.randn(*rows, inputs, dtype=F64)
    actual, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(gradients(layer, actual), gradients(layer, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    dense = layer.to_dense()
    torch.testing.assert_close(dense(x), actual)
    assert (dense.bias is not None) == bias
    torch.testing.assert_close(layer.squared_norm(), layer.weight.square().sum())


@pytest.mark.parametrize(("kind", "inputs", "outputs", "in_shape", "out_shape"), CASES)
def test_errors_are_those_made(kind, inputs, outputs, in_shape, out_shape):
    dense, shapes = nn.Linear(inputs, outputs, dtype=F64), {"in_shape": in_shape, "out_shape": out_shape}
    ranks = range(1, kind.full_rank(dense, **shapes) + 1)
    weight, found = dense.weight.detach(), kind.errors(dense, ranks, **shapes)
    for rank, error in zip(ranks, found, strict=True):
        made = kind.from_dense(dense, rank=rank, **shapes).weight.detach() - weight
        assert float(made.norm() / weight.norm()) == pytest.approx(error, rel=1e-6, abs=1e-7)
    assert found[-1] < 1e-7
    assert kind.errors(dense, [], **shapes) == ()


def test_no_other_block_train_is_closer():
    """A random change of the factors never lowers the error: the projection is a minimum."""
    dense = nn.Linear(12, 20, dtype=F64)
    layer = BTTLinear.from_dense(dense, rank=2)
    least = float((layer.weight - dense.weight).detach().norm())
    with torch.no_grad():
        for _ in range(50):
            moved = [core + 0.05 * torch.randn_like(core) for core in layer.cores]
            twin = BTTLinear.like(dense, rank=2)
            for core, value in zip(twin.cores, moved, strict=True):
                core.copy_(value)
            assert float((twin.weight - dense.weight).norm()) > least


@kinds
@given(share=st.floats(0, 1), rows=st.sampled_from([1, 3, 30, 300]), size=st.sampled_from([(12, 10), (97, 31)]))
@few
def test_costs_are_counted(kind, share, rows, size):
    dense = nn.Linear(*size)
    rank = max(1, round(share * kind.full_rank(dense)))
    layer = kind.like(dense, rank=rank)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(rows, size[0]))
    cost = kind.cost(dense, [Call((rows, size[0]), (rows, size[1]))], rank=rank)
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.params == sum(p.numel() for p in layer.parameters())
    if kind is not BTTLinear:
        assert layer.schedule(rows, training=False).macs(rows) == cost.macs


def test_parameters_and_products_of_a_block_train_are_the_published_formula():
    dense = nn.Linear(4096, 4096, bias=False, device="meta")
    cost = BTTLinear.cost(dense, [Call((32, 4096), (32, 4096))], rank=2)
    assert cost.params == 2 * 2 * 4096 * 64
    assert cost.macs == 32 * cost.params
    assert BTTLinear.variants(dense) == ({"in_shape": (64, 64), "out_shape": (64, 64)},)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("head", [1, 2, 3, 0])
def test_every_way_of_cutting_a_ring_gives_the_same(head, rows):
    layer = TRLinear(36, 24, dtype=F64, rank=3, in_shape=(2, 3, 3, 2), out_shape=(2, 3, 2, 2))
    shapes, x = tuple(_core_shapes(layer._form, 3)), torch.randn(rows, 36, dtype=F64)
    way = _cut_after(shapes, head, rows, True) if head else _rebuilt(shapes, rows, True)
    layer._schedules = {mode: (way,) * len(PLANNED) for mode in (False, True)}
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    with FlopCounterMode(display=False) as counter:
        actual = layer(x)
    assert counter.get_total_flops() == 2 * way.macs(rows)
    torch.testing.assert_close(actual, expected)
    for got, wanted in zip(gradients(layer, actual), gradients(layer, expected), strict=True):
        torch.testing.assert_close(got, wanted)


def test_rings_are_cut_at_large_sizes_and_rebuilt_at_small_ones():
    wide = TRLinear(3072, 262144, rank=2, in_shape=(4, 4, 4, 4, 4, 3), out_shape=(8,) * 6, device="meta")
    small = TRLinear(64, 64, rank=8)
    for training in (True, False):
        assert all(wide.schedule(rows, training).head for rows in (1, 32, 10_000))
        assert small.schedule(10_000, training).head == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@few
def test_boxes_are_the_indices_below_a_size(shape, data):
    size = data.draw(st.integers(1, math.prod(shape)))
    inside = torch.zeros(shape, dtype=torch.int)
    for box in boxes(size, shape):
        inside[box] += 1
    assert inside.flatten().tolist() == [1] * size + [0] * (math.prod(shape) - size)


def test_spectra_of_a_kronecker_sum_are_those_of_the_rearrangement():
    dense = nn.Linear(12, 20, dtype=F64)
    (spectrum,) = KroneckerLinear.spectra(dense, in_shape=(3, 4), out_shape=(4, 5))
    paired = rearranged(dense.weight.detach(), (4, 5), (3, 4))
    torch.testing.assert_close(spectrum.values, singular_values(paired))
    assert spectrum.shape == (12, 20)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 40])
def test_autocast(kind, dtype, rows):
    layer, x = kind(60, 37, rank=2), torch.randn(rows, 60)
    with torch.autocast("cpu", dtype=dtype):
        half = layer(x)
        half.float().square().mean().backward()
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), layer(x), rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_layer_starts_at_its_variance(kind, dtype):
    layer = kind(4096, 1024, rank=2, dtype=dtype)
    assert float(layer.squared_norm().detach()) == pytest.approx(1024 / 3, rel=0.02)


@kinds
def test_nothing_is_allocated_on_the_meta_device(kind):
    layer = kind(4096, 4096, rank=2, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 4096, device="meta")).shape == (3, 4096)


@kinds
def test_exports_with_a_batch_of_any_size(kind):
    layer = kind(60, 37, rank=2).eval()
    program = torch.export.export(layer, (torch.randn(4, 60),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not any("einsum" in str(node.target) for node in program.graph.nodes)
    for rows in (2, 30, 700):
        x = torch.randn(rows, 60)
        torch.testing.assert_close(program.module()(x), layer(x))


@kinds
def test_compiles_to_one_graph_at_every_batch(kind):
    layer = kind(24, 30, rank=2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for rows in (1, 3, 40):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(compiled(x), layer(x))


@kinds
def test_a_whole_model_is_planned_applied_stored_and_made_dense_again(kind, tmp_path):
    model, x = nn.Sequential(nn.Linear(256, 400), nn.ReLU(), nn.Linear(400, 256)), torch.randn(5, 256)
    plan = rf.plan(model, budget=rf.Budget(params=0.5), stats=rf.measure(model, example=x), methods=(kind.method,))
    assert {choice.method for choice in plan.layers.values()} == {kind.method}
    assert rf.Plan.from_json(plan.to_json()) == plan
    small = rf.apply(model, plan)
    assert isinstance(small[0], kind)
    assert plan.params == sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    dense = rf.densify(small)
    assert type(dense[0]) is nn.Linear
    torch.testing.assert_close(dense(x), small(x))
    rf.save(small, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", nn.Sequential(nn.Linear(256, 400), nn.ReLU(), nn.Linear(400, 256)))
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)
    assert kind.method in rf.report(model, small, plan, example=x).to_text()
    rf.export(small.eval(), tmp_path / "small.pt2", example=x)
    fresh = rf.apply(model, plan, init="random")
    assert not torch.equal(fresh(x), small(x))


@kinds
def test_the_conv1d_of_hugging_face_is_decomposed(kind):
    utilities = pytest.importorskip("transformers.pytorch_utils")
    model, x = nn.Sequential(utilities.Conv1D(400, 256)), torch.randn(4, 256)
    plan = rf.plan(model, budget=rf.Budget(params=0.9), stats=rf.measure(model, example=x), methods=(kind.method,))
    small = rf.apply(model, plan)
    assert isinstance(small[0], kind)
    twin = layers.stock_twin(model[0])
    full = kind.from_dense(twin, rank=kind.full_rank(twin))
    torch.testing.assert_close(full(x), model(x), rtol=1e-4, atol=1e-5)


BAD = [
    (lambda: BTTLinear(12, 12, rank=0), "rank=0"),
    (lambda: BTTLinear(12, 12, rank=5), "full rank 4"),
    (lambda: BTTLinear(12, 12, rank=(2, 2)), "an int"),
    (lambda: BTTLinear(12, 12, rank=1, in_shape=(2, 2, 3), out_shape=(2, 2, 3)), "two dims"),
    (lambda: BTTLinear(12, 12, rank=1, in_shape=(3, 3)), "does not cover 12"),
    (lambda: KroneckerLinear(12, 12, rank=1, out_shape=(12,)), "two cores"),
    (lambda: KroneckerLinear(12, 12, rank=10), "full rank 9"),
    (lambda: TRLinear(12, 12, rank=2.0), "rank=2.0"),
    (lambda: TRLinear(12, 12, rank=(1, 1)), r"rank=\(1, 1\)"),
    (lambda: TRLinear(36, 36, rank=(1, 1, 9, 9), in_shape=(3, 2, 2, 3), out_shape=(3, 2, 2, 3)), "cannot be filled"),
    (lambda: TRLinear(12, 12, rank=1, in_shape=(3, 4), out_shape=(2, 2, 3)), "as many dims"),
    (lambda: BTTLinear.from_dense(nn.Embedding(12, 4), rank=1), "nn.Linear"),
    (lambda: BTTLinear.rank_grid(nn.Linear(40, 40), multiple=0), "multiple must be a whole number >= 1, got 0"),
    (lambda: TRLinear.rank_grid(nn.Linear(40, 40), multiple=0), "multiple must be a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(LayerError, match=message):
        call()


def test_a_ring_takes_one_rank_per_core():
    layer = TRLinear(27, 27, rank=(2, 3, 4), in_shape=(3, 3, 3), out_shape=(3, 3, 3))
    assert [tuple(core.shape) for core in layer.cores] == [(2, 3, 3, 3), (3, 3, 3, 4), (4, 3, 3, 2)]
    assert layer.rank == (2, 3, 4)
