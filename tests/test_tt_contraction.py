"""Is a tensor train contracted in the scheduled order, within the memory predicted, with equal results in any order?"""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from rankfold.errors import LayerError, PlanError
from rankfold.layers import TTConv1d, TTConv2d, TTLinear
from rankfold.layers.tensor import _tt_conv_schedule, _tt_order
from rankfold.layers.tensor._tt_contract import contract, merge
from rankfold.layers.tensor._tt_order import BATCHES, CHUNK, Chain, Step, bucket, order_of, schedule_sweep
from rankfold.layers.tensor._tt_schedule import sweeps

few = settings(max_examples=15, deadline=None, derandomize=True)
F64 = torch.float64
VGG = {"in_shape": (2, 7, 8, 8, 7, 4), "out_shape": (4,) * 6}
SQUARE = {"in_shape": (8,) * 4, "out_shape": (8,) * 4}


class Made(TorchDispatchMode):
    """Watches the bytes of the largest tensor that an operation allocates."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def groupings(order):
    for cuts in itertools.product((False, True), repeat=order - 1):
        yield tuple(itertools.pairwise([0, *(k + 1 for k, cut in enumerate(cuts) if cut), order]))


def force(layer, sweep):
    """Make a layer take one order for every batch and mode."""
    schedules = (sweep,) * len(BATCHES)
    layer._schedules = {False: schedules, True: schedules}
    return layer


def gradients(layer, x, forward):
    """The output, and the gradients of the input and of every parameter."""
    leaf = x.clone().requires_grad_()
    output = forward(leaf)
    seen = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(output.dtype)
    return output, *torch.autograd.grad(output, [leaf, *layer.parameters()], seen)


def same(actual, expected, **tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


def order_taken(chain, groups, from_left, chunk=0, recompute=False):
    """The sweep of given groups, its chunks and what it keeps chosen freely."""
    return dataclasses.replace(order_of(chain, groups, from_left, training=True), chunk=chunk, recompute=recompute)


CHAIN = Chain((2, 3, 2, 4), (3, 2, 4, 2), (1, 3, 5, 2, 1))


@pytest.mark.parametrize("from_left", [True, False])
@pytest.mark.parametrize("groups", list(groupings(4)), ids=str)
@pytest.mark.parametrize("chunk", [0, 1, 4, 6, 9])  # 4 does not divide the six rows
def test_every_order_gives_the_same_result(groups, from_left, chunk):
    cores = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in CHAIN.shapes]
    x = torch.randn(6, 48, 3, dtype=F64, requires_grad=True)  # three columns are carried along
    weight = contract(torch.eye(48, dtype=F64)[None], cores, order_taken(CHAIN, ((0, 4),), True))[0]
    expected = weight @ x
    for recompute in (False, True):
        actual = contract(x, cores, order_taken(CHAIN, groups, from_left, chunk, recompute))
        seen = torch.randn_like(actual)
        found = torch.autograd.grad(actual, [x, *cores], seen)
        same([actual, *found], [expected, *torch.autograd.grad(expected, [x, *cores], seen, retain_graph=True)])


SHAPES = [  # in, out, options: exact, primes padded, long, modes of one, redundant bonds
    (12, 20, {"in_shape": (3, 4), "out_shape": (4, 5)}),
    (11, 17, {"in_shape": (3, 4), "out_shape": (3, 6)}),
    (23, 7, {"in_shape": (2, 3, 4), "out_shape": (2, 2, 2)}),
    (36, 16, {"in_shape": (2, 3, 3, 2), "out_shape": (2, 2, 2, 2)}),
    (30, 8, {"in_shape": (1, 5, 6), "out_shape": (2, 4, 1)}),
    (31, 61, {"in_shape": (2, 4, 4), "out_shape": (4, 4, 4), "redundant": True}),
]


@pytest.mark.parametrize(("inputs", "outputs", "options"), SHAPES)
@given(data=st.data(), cap=st.integers(1, 9), rows=st.sampled_from([0, 1, 5, 33]), chunk=st.sampled_from([0, 1, 4]))
@few
def test_a_layer_equals_its_dense_layer_in_every_order(inputs, outputs, options, data, cap, rows, chunk):
    full = TTLinear.full_rank(nn.Linear(inputs, outputs, device="meta"), **options)
    rank = cap if options.get("redundant") else min(cap, full)
    layer = TTLinear(inputs, outputs, dtype=F64, rank=rank, **options)
    groups = data.draw(st.sampled_from(list(groupings(len(options["in_shape"])))))
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows), dtype=F64)
    expected = gradients(layer, x, lambda leaf: nn.functional.linear(leaf, layer.weight, layer.bias))
    torch.testing.assert_close(layer.to_dense()(x), expected[0])
    drawn = order_taken(layer._chain, groups, data.draw(st.booleans()), chunk, data.draw(st.booleans()))
    for sweep in (None, drawn):
        forced = layer if sweep is None else force(layer, sweep)
        same(gradients(forced, x, forced), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@given(data=st.data())
@few
def test_the_schedule_counts_what_is_done_and_allocated(training, data):
    order = data.draw(st.integers(2, 4))
    dims = st.lists(st.integers(2, 8), min_size=order, max_size=order).map(tuple)
    in_shape, out_shape = data.draw(dims), data.draw(dims)
    sizes, rows = (math.prod(in_shape), math.prod(out_shape)), data.draw(st.sampled_from([1, 3, 40, 300]))
    layer = TTLinear(
        *sizes, False, rank=data.draw(st.integers(1, 9)), redundant=True, in_shape=in_shape, out_shape=out_shape
    )
    schedule = layer.schedule(rows, training)
    x = torch.randn(rows, sizes[0], requires_grad=training)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter, Made() as made:
        output = layer(x)
    assert counter.get_total_flops() == 2 * schedule.macs
    assert made.largest <= max(schedule.peak, 4 * output.numel(), 4 * x.numel())
    if training:
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == 2 * schedule.backward_macs


@pytest.mark.parametrize(
    ("sizes", "options", "rank", "batch"),
    [
        ((4096, 4096), SQUARE, 16, 70),
        ((25088, 4096), VGG, 4, 50),
        ((4096, 4096), {"in_shape": (64, 64), "out_shape": (64, 64)}, 8, 33),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_no_intermediate_exceeds_the_bound(sizes, options, rank, batch, training):
    layer = TTLinear(*sizes, rank=rank, **options)
    schedule = layer.schedule(batch, training)
    assert schedule.chunk < batch
    assert schedule.peak <= 4 * CHUNK
    x = torch.randn(batch, sizes[0], requires_grad=training)
    with torch.set_grad_enabled(training), Made() as made:
        output = layer(x)
    ends = 4 * max(x.numel(), output.numel())
    assert made.largest <= max(schedule.peak, ends)
    if training:
        with Made() as made:
            output.sum().backward()
        assert made.largest <= max(4 * CHUNK, ends)


@given(st.data())
@few
def test_the_scheduled_order_is_the_fastest_of_the_model(data):
    order = data.draw(st.integers(2, 5))
    dims = st.lists(st.integers(1, 9), min_size=order, max_size=order).map(tuple)
    ranks = data.draw(st.lists(st.integers(1, 20), min_size=order - 1, max_size=order - 1))
    chain, rows = Chain(data.draw(dims), data.draw(dims), (1, *ranks, 1)), data.draw(st.sampled_from(BATCHES))
    training = data.draw(st.booleans())
    schedule = schedule_sweep(chain, rows, training=training)
    scores = []
    for from_left in (True, False):
        seconds = _tt_order._seconds(chain, rows, from_left, training, 1)
        scores += [_tt_order.RATE * sum(itertools.starmap(seconds, groups)) for groups in groupings(order)]
    assert schedule.score * _tt_order.TIE <= min(scores) <= schedule.score * (1 + 1e-9)


def trees(start, stop):
    """Every way to merge neighbouring cores, as the bonds that are contracted, the last product last."""
    if stop - start == 1:
        yield ()
    for k in range(start + 1, stop):
        for left, right in itertools.product(trees(start, k), trees(k, stop)):
            yield (*left, *right, k)


def products(chain, tree):
    """The products of a tree, worked out on the sets of cores that each one joins."""
    whole = {k: (k, k + 1) for k in range(len(chain.out_shape))}
    found = []
    for bond in tree:
        start, stop = whole[bond - 1][0], whole[bond][1]
        sizes = (chain.core(start, bond) // chain.ranks[bond], chain.core(bond, stop) // chain.ranks[bond])
        found.append((sizes[0], chain.ranks[bond], sizes[1]))
        whole.update(dict.fromkeys(range(start, stop), (start, stop)))
    return found


@given(st.data())
@few
def test_cores_are_merged_by_the_fastest_tree_of_products(data):
    order = data.draw(st.integers(2, 6))
    dims = st.lists(st.integers(1, 4), min_size=order, max_size=order).map(tuple)
    ranks = data.draw(st.lists(st.integers(1, 20), min_size=order + 1, max_size=order + 1))
    chain = Chain(data.draw(dims), data.draw(dims), tuple(ranks))
    merged = chain.merge(0, order)
    seconds = [sum(itertools.starmap(_tt_order._joining, products(chain, tree))) for tree in trees(0, order)]
    assert merged.seconds == pytest.approx(min(seconds))
    cores = [torch.randn(shape, dtype=F64) for shape in chain.shapes]
    with FlopCounterMode(display=False) as counter:
        core = merge(cores, merged.order)
    assert counter.get_total_flops() == 2 * merged.macs
    torch.testing.assert_close(core, merge(cores, (0,) * (order - 1)))


def test_halves_are_merged_first_where_that_is_a_third_less():
    chain = Chain((8,) * 4, (8,) * 4, (1, 32, 32, 32, 1))
    halves = chain.merge(0, 4)
    assert halves.order == (0, 1, 0)
    assert halves.joins[-1] == (4096, 32, 4096)
    grown = products(chain, (1, 2, 3))
    assert halves.macs < 0.7 * sum(map(math.prod, grown))
    assert chain.merge(1, 3).order == (0,)


def test_no_product_of_a_merge_exceeds_the_bound():
    chain = Chain((8,) * 4, (8,) * 4, (1, 5000, 5000, 5000, 1))  # the weight is small, half of it is not
    assert chain.core(0, 4) <= _tt_order.LARGEST_MERGE < chain.core(0, 2)
    assert schedule_sweep(chain, 16384).groups == tuple((k, k + 1) for k in range(4))


def test_schedules_differ_between_batches_and_are_cached():
    chain = Chain((8,) * 4, (8,) * 4, (1, 8, 8, 8, 1))
    assert len(schedule_sweep(chain, 1).groups) > len(schedule_sweep(chain, 1024).groups) == 2
    assert schedule_sweep(chain, 1024) is schedule_sweep(Chain((8,) * 4, (8,) * 4, (1, 8, 8, 8, 1)), 1024)
    layer = TTLinear(4096, 4096, rank=8, **SQUARE)
    assert layer.schedule(1000) is layer.schedule(1000)
    assert [bucket(rows) for rows in (0, 1, 2, 10**9)] == [0, 0, 1, len(BATCHES) - 1]


def test_the_mode_of_a_schedule_is_that_of_a_call():
    layer = TTLinear(64, 64, rank=4)
    assert layer.schedule(8).training
    with torch.no_grad():
        assert not layer.schedule(8).training
    assert not layer.requires_grad_(False).schedule(8).training
    assert layer.schedule(8, training=True).backward_macs > 0 == layer.schedule(8, training=False).backward_macs


def test_a_schedule_prints_its_order():
    schedule = TTLinear(4096, 4096, rank=8, **SQUARE).schedule(1024, training=True)
    assert schedule.order == "cores (1 2)(3 4) from the left"
    assert str(schedule).splitlines()[0] == "cores (1 2)(3 4) from the left: 1024 rows 16 at a time, training"
    assert "kept for backward" in str(schedule)
    small = TTLinear(6, 6, rank=4).schedule(4000, training=False)
    assert small.rebuilt
    assert "the dense weight rebuilt" in str(small)


def test_the_steps_of_a_sweep_are_the_matrices_it_multiplies():
    chain = Chain((2, 3), (4, 5), (1, 6, 1))
    assert order_of(chain, ((0, 1), (1, 2)), True, training=False).steps(chain) == [
        Step(1, 12, 4, 5),
        Step(2, 3, 30, 1),
    ]
    right = order_of(chain, ((0, 1), (1, 2)), False, training=True)
    assert right.steps(chain, 7) == [Step(4, 18, 5, 7), Step(1, 2, 24, 21)]
    assert right.row_macs == 4 * 18 * 5 + 2 * 24 * 3
    assert right.kept(chain) == 4 * 18
    assert right.chunk == CHUNK // (4 * 18)


RECOMPUTED = [
    (lambda **more: TTLinear(25088, 4096, rank=4, **VGG, **more), (50, 25088)),
    (lambda **more: TTLinear(1200, 890, rank=4, in_shape=(8, 10, 15), out_shape=(9, 10, 10), **more), (7, 2, 1200)),
    (lambda **more: TTConv2d(64, 48, 3, padding=1, rank=1, in_shape=(8, 8), out_shape=(6, 8), **more), (2, 64, 20, 20)),
    (lambda **more: TTConv1d(64, 60, 1, rank=2, in_shape=(8, 8), out_shape=(6, 10), **more), (2, 64, 50)),
]


@pytest.fixture
def chained(monkeypatch):
    """Convolutions that never rebuild their kernel."""
    monkeypatch.setattr(_tt_conv_schedule, "FILTERING", 1e15)
    monkeypatch.setattr(_tt_conv_schedule, "CONVOLVING", 1.0)
    _tt_conv_schedule.schedule_conv.cache_clear()
    yield
    _tt_conv_schedule.schedule_conv.cache_clear()


def saved_for_backward(layer, x):
    """The output, and the bytes of the storages that backward holds on to."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    return output, sum(storages.values())


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize(("make", "size"), RECOMPUTED)
def test_recomputing_changes_nothing_but_what_is_kept(make, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = make()
    again = make(recompute=0)
    again.load_state_dict(layer.state_dict())
    state = torch.get_rng_state()
    kept, recomputed = (gradients(each, x, each) for each in (layer, again))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    shape = x.reshape(-1, x.shape[-1]).shape[0] if isinstance(layer, TTLinear) else x.shape
    schedules = [each.schedule(shape, training=True) for each in (layer, again)]
    assert [schedule.recomputed for schedule in schedules] == [False, True]
    assert schedules[0].saved > schedules[1].saved == 0
    assert schedules[1].backward_macs > schedules[0].backward_macs
    (_, much), (_, little) = (saved_for_backward(each, x.clone().requires_grad_()) for each in (layer, again))
    assert little < much - schedules[0].saved // 2
    patient = make(recompute=1e9)
    assert not patient.schedule(shape, training=True).recomputed


def test_recompute_compares_intermediates_with_input_and_output():
    chain = Chain((8,) * 4, (8,) * 4, (1, 8, 8, 8, 1))
    schedule = schedule_sweep(chain, 1024, training=True)
    factor = schedule.kept(chain) / (2 * 4096)
    assert [sweeps(chain, limit)[True][4].recompute for limit in (None, factor, 0.99 * factor)] == [False, False, True]
    assert not any(sweep.recompute for sweep in sweeps(chain, 0.0)[False])


@pytest.mark.parametrize("recompute", [-1, float("nan"), float("inf"), True, "always"])
def test_a_recompute_that_is_no_factor_is_refused(recompute):
    with pytest.raises(LayerError, match="recompute must be a number >= 0, got"):
        TTLinear(12, 12, rank=2, recompute=recompute)
    with pytest.raises(LayerError, match="recompute must be a number >= 0, got"):
        TTConv2d.rank_grid(nn.Conv2d(12, 12, 3), recompute=recompute)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 48), nn.Conv1d(8, 8, 3)

    def forward(self, x):
        return self.second(self.first(x).reshape(-1, 8, 6))


def test_options_are_kept_only_where_set():
    dense = nn.Linear(64, 48)
    layer = TTLinear(64, 48, rank=3, recompute=1.5)
    assert layer.options == {"in_shape": (8, 8), "out_shape": (6, 8), "recompute": 1.5}
    assert TTLinear.like(dense, rank=3, **layer.options).options == layer.options
    assert TTLinear.from_dense(dense, rank=3, **layer.options).recompute == 1.5
    assert "recompute=1.5" in repr(layer)
    assert set(TTLinear(64, 48, rank=3).options) == {"in_shape", "out_shape"}
    assert TTConv2d(8, 8, 3, rank=99, redundant=True).options["redundant"] is True


def test_a_stored_model_keeps_its_options(tmp_path):
    net = Net()
    plan = rf.plan(net, budget=rf.Budget(params=0.9), methods=("tt",), planning=rf.Planning(rule="uniform"))
    choices = {
        "first": {"rank": 3, "options": {"in_shape": (8, 8), "out_shape": (6, 8), "recompute": 1.5}},
        "second": {"rank": 8, "options": {"in_shape": (2, 4), "out_shape": (4, 2), "redundant": True}},
    }
    layers = {name: dataclasses.replace(choice, method="tt", **choices[name]) for name, choice in plan.layers.items()}
    plan = dataclasses.replace(plan, layers=layers)
    assert rf.Plan.from_json(plan.to_json()) == plan
    small = rf.apply(net, plan, init="random")
    assert small.first.recompute == 1.5
    assert small.second._chain.ranks == (1, 8, 8, 1)
    rf.save(small, plan, tmp_path / "small")
    loaded = rf.load(tmp_path / "small", Net())
    assert loaded.first.options == small.first.options
    with pytest.raises(PlanError):
        rf.Plan.from_json(plan.to_json().replace("1.5", "null"))


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [make for make, _ in RECOMPUTED[1:3]])
@pytest.mark.parametrize("recompute", [None, 0])
def test_autocast_gives_half_precision_in_every_order(dtype, make, recompute):
    layer = make(recompute=recompute)
    x = torch.randn(5, 1200) if isinstance(layer, TTLinear) else torch.randn(2, 64, 12, 12)
    expected = gradients(layer, x, layer)
    sweep = order_taken(layer._chain, ((0, 1), (1, 3)), True, 2) if isinstance(layer, TTLinear) else None
    for each in (layer, force(layer, sweep)) if sweep else (layer,):
        with torch.autocast("cpu", dtype=dtype):
            actual = gradients(each, x, each)
        assert actual[0].dtype == dtype
        assert all(got.dtype == torch.float32 for got in actual[1:])
        for got, wanted in zip(actual, expected, strict=True):
            assert float((got - wanted).detach().norm()) < 0.05 * float(wanted.detach().norm())


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("recompute", [None, 0])
@pytest.mark.parametrize(("make", "size"), RECOMPUTED[1:])
def test_exports_with_and_without_recomputing(make, size, recompute):
    layer, x = make(recompute=recompute), torch.randn(size)
    axis = {0: torch.export.Dim("batch", min=2, max=64)}
    for each in (layer, layer.eval()):
        program = torch.export.export(each, (x,), dynamic_shapes=(axis,))
        for batch in (2, 5, 40):
            more = torch.randn(batch, *size[1:])
            torch.testing.assert_close(program.module()(more), layer(more), rtol=1e-4, atol=1e-5)
        assert not any("einsum" in str(node.target) for node in program.graph.nodes)


@pytest.mark.usefixtures("chained")
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, 0])
@pytest.mark.parametrize(("make", "size"), RECOMPUTED[1:])
def test_compiles_to_one_graph_with_and_without_recomputing(make, size, recompute):
    torch._dynamo.reset()
    layer = make(recompute=recompute)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (size[0], 5, 6, 9):
        more = torch.randn(batch, *size[1:])
        same(gradients(layer, more, compiled), gradients(layer, more, layer), rtol=1e-4, atol=1e-4)


def test_the_wide_net_of_novikov_keeps_little():
    wide = TTLinear(3072, 262144, rank=8, in_shape=(4, 4, 4, 4, 4, 3), out_shape=(8,) * 6, recompute=1.0)
    back = TTLinear(262144, 4096, rank=8, in_shape=(8,) * 6, out_shape=(4,) * 6, recompute=1.0)
    assert sum(p.numel() for p in wide.cores) == 8640
    for layer in (wide, back):
        schedule = layer.schedule(32, training=True)
        assert schedule.peak <= 4 * CHUNK
        assert schedule.saved < 2**28
    x = torch.randn(2, 3072)
    with Made() as made:
        back(torch.relu(wide(x))).square().mean().backward()
    assert made.largest <= 4 * CHUNK
    assert all(core.grad is not None and bool(core.grad.any()) for core in [*wide.cores, *back.cores])
