"""Is a convolution the same whichever of its stages are merged, and is it the chain wherever merging is not sound?"""

import copy
import dataclasses
from itertools import combinations

import pytest
import torch
from cases import CONVOLUTIONS, PADDING_MODES, dense_layers, example_of, form_name, part_of, small_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from rankfold import layers
from rankfold.layers.conv._conv_layer import FactorisedConv
from rankfold.layers.conv._conv_schedule import LARGEST_MERGE, schedule_chain

CHAINS = [form for form in CONVOLUTIONS if issubclass(form[0], FactorisedConv)]
forms = pytest.mark.parametrize(("layer", "options"), CHAINS, ids=map(form_name, CHAINS))
few = settings(max_examples=4, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
IMAGE = (64, 1, 28, 28)


def groupings(count):
    for kept in range(count):
        for cuts in combinations(range(1, count), kept):
            yield tuple(zip((0, *cuts), (*cuts, count), strict=True))


def forced(layer, groups):
    """A copy of a layer that takes these groups whatever it is given."""
    other = copy.deepcopy(layer)
    other._grouping = lambda _: groups
    return other


def chain_of(layer):
    return nn.Sequential(*copy.deepcopy(layer).children())


def results(run, x, parameters, seen):
    x = x.clone().requires_grad_()
    output = run(x)
    return output, *torch.autograd.grad((output * seen).sum(), [x, *parameters])


@forms
@given(data=st.data(), share=st.floats(0, 1))
@few
def test_every_grouping_gives_the_outputs_and_the_gradients_of_the_chain(layer, options, data, share):
    dense, x = data.draw(dense_layers(layer.dense_type))
    built = layer.like(dense, rank=part_of(layer.full_rank(dense, **options), share), **options)
    seen, chain = torch.randn_like(dense(x)), chain_of(built)
    wanted = results(chain, x, list(chain.parameters()), seen)
    for groups in [*groupings(len(built._stages))][1:][-4:]:  # of 3-D chains in three parts, not all there are
        other = forced(built, groups)
        got = results(other, x, list(other.parameters()), seen)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@forms
@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_padding_is_that_of_the_chain(layer, options, mode, padding):
    axes = layer.dense_type.__name__[-2]
    kernel = (4, 3, 2)[: int(axes)]
    dense = layer.dense_type(4, 6, kernel, padding=padding, padding_mode=mode, groups=2, dtype=torch.float64)
    built = layer.like(dense, rank=small_rank(layer, dense, options), **options)
    x = torch.randn(2, 4, *(7, 6, 5)[: int(axes)], dtype=torch.float64)
    whole = forced(built, ((0, len(built._stages)),))
    torch.testing.assert_close(whole(x), chain_of(built)(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole(x[0]), chain_of(built)(x[0]), rtol=1e-10, atol=1e-10)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rebuilt_kernel_is_as_precise_as_the_chain_in_half_precision(layer, options, dtype):
    dense, x = example_of(layer.dense_type)
    built = layer.like(dense, rank=small_rank(layer, dense, options), **options)
    exact, x = copy.deepcopy(built).double()(x.double()).detach(), x.to(torch.float32)
    whole = forced(built, ((0, len(built._stages)),))
    errors = []
    for run in (chain_of(built), whole):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            output = run(x)
        assert output.dtype == dtype
        errors.append(float((output.double() - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 1.5 * errors[0]
    torch.testing.assert_close(whole.to(dtype)(x.to(dtype)).detach().double(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("layer", [layers.CPConv2d, layers.CPConv3d])
def test_the_memory_format_is_that_of_the_dense_layer(layer, channels):
    axes = int(layer.dense_type.__name__[-2])
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    dense = layer.dense_type(channels, 8, 3)
    built = layer.like(dense, rank=3)
    for format in (torch.contiguous_format, last):
        x = torch.randn(2, channels, *[6] * axes).to(memory_format=format)
        for weights in (torch.contiguous_format, last):
            wanted = copy.deepcopy(dense).to(memory_format=weights)(x)
            got = forced(built, ((0, 3),)).to(memory_format=weights)(x)
            assert got.stride() == wanted.stride()


@pytest.mark.parametrize(
    ("layer", "shape", "training", "way"),
    [
        (layers.CPConv2d(1, 10, 3, rank=6, separable=True), IMAGE, True, "rebuilt"),
        (layers.CPConv2d(10, 10, 3, rank=6), (1, 10, 26, 26), False, "rebuilt"),
        (layers.CPConv2d(256, 256, 3, padding=1, rank=256), (8, 256, 28, 28), True, "chain"),
        (layers.CPConv2d(64, 64, 3, padding=1, rank=64, separable=True), (8, 64, 56, 56), True, "merged"),
        (layers.TuckerConv2d(256, 256, 3, padding=1, rank=(64, 64)), (8, 256, 28, 28), False, "chain"),
        (layers.LowRankConv2d(64, 64, 3, padding=1, rank=24, split="spatial"), (8, 64, 56, 56), True, "chain"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_small_layers_are_rebuilt_and_large_ones_are_chains(layer, shape, training, way):
    assert layer.schedule(shape, training).way == way


def test_a_kernel_beyond_the_bound_is_not_rebuilt():
    wide = layers.LowRankConv2d(2048, 1024, 3, rank=512, device="meta")
    assert 2048 * 1024 * 9 > LARGEST_MERGE
    assert wide.schedule((1, 2048, 3, 3)).way == "chain"


def test_what_a_schedule_says_is_what_is_done():
    layer = layers.CPConv2d(1, 10, 3, rank=6, separable=True)
    schedule = layer.schedule(IMAGE, True)
    positions, kernel = 64 * 26 * 26, 10 * 9
    products = (6 * 3, 6 * 9, 6 * kernel)  # one input channel: from the left, so that what is made stays small
    assert schedule.macs == positions * kernel + sum(products)
    assert schedule.launches == 4
    x = torch.randn(IMAGE)
    assert schedule.saved_bytes == 4 * (x.numel() + kernel)
    assert schedule.peak_bytes == 4 * (x.numel() + kernel + positions * 10)
    chain = layers.CPConv2d(256, 256, 3, padding=1, rank=256).schedule((8, 256, 28, 28), True)
    assert chain.saved_bytes == 3 * 4 * 8 * 256 * 28 * 28
    assert chain.macs == 8 * 28 * 28 * 256 * (256 + 9 + 256)
    assert 0 < schedule.seconds < chain.seconds


def test_schedules_are_cached_and_deterministic():
    layer = layers.CPConv2d(1, 10, 3, rank=6)
    assert layer.schedule(IMAGE) is layers.CPConv2d(1, 10, 3, rank=6).schedule(IMAGE)
    before = layer.schedule(IMAGE)
    schedule_chain.cache_clear()
    assert layer.schedule(IMAGE) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.macs = 0
    x = torch.randn(1, 1, 6, 6)
    layer(x)
    asked = schedule_chain.cache_info()
    layer(x)
    assert schedule_chain.cache_info() == asked


def test_a_schedule_is_for_a_call_with_the_gradients_it_makes():
    layer = layers.CPConv2d(10, 10, 3, rank=6)
    x = torch.randn(64, 10, 26, 26)
    assert layer.schedule(x).saved_bytes > 0
    assert layer.schedule(x).seconds < layer.schedule(x.clone().requires_grad_()).seconds
    assert layer.schedule(x.shape) == layer.schedule(x.shape, training=True)
    with torch.no_grad():
        assert layer.schedule(x) == layer.schedule(x, training=False)
        assert layer.schedule(x).saved_bytes == 0
    assert layer.requires_grad_(False).schedule(x).saved_bytes == 0


def hooked(stage):
    stage.register_forward_hook(lambda *_: None)


def wrapped(layer):
    layer.up = nn.Sequential(layer.up)


def reshaped(layer):  # as tools for structured pruning do
    for name, axis in (("down", 0), ("depthwise", 0), ("up", 1)):
        stage = layer.get_submodule(name)
        stage.weight = nn.Parameter(stage.weight.detach().narrow(axis, 0, 2))
    layer.depthwise.groups = 2


CHANGES = {
    "forward hook": lambda layer: hooked(layer.down),
    "forward pre-hook": lambda layer: layer.up.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.up.register_full_backward_hook(lambda *_: None),
    "parametrisation": lambda layer: parametrizations.weight_norm(layer.up),
    "pruning": lambda layer: prune.random_unstructured(layer.down, "weight", 0.5),
    "wrapper": wrapped,
    "replaced forward": lambda layer: setattr(layer.up, "forward", layer.up.forward),
    "other shape": reshaped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_longer_stock_is_a_chain(change):
    layer = layers.CPConv2d(1, 10, 3, rank=6)
    x = torch.randn(2, 1, 8, 8)
    assert layer._grouping(x) == ((0, 3),)
    CHANGES[change](layer)
    assert layer._grouping(x) == ((0, 1), (1, 2), (2, 3))
    torch.testing.assert_close(layer(x), nn.Sequential(*layer.children())(x))


def test_hooks_on_all_modules_see_the_stages():
    layer, seen = layers.CPConv2d(1, 10, 3, rank=6), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    layer(torch.randn(IMAGE))
    handle.remove()
    assert seen == ["Conv2d"] * 3 + ["CPConv2d"]


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_with_a_symbolic_batch_is_the_chain_and_fits_any_batch(strict):
    layer = layers.CPConv2d(1, 10, 3, rank=6).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=512)},)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(4, 1, 8, 8),), dynamic_shapes=shapes, strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.conv2d.default] * 3
    for batch in (1, 7, 300):
        x = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(program.module()(x), layer(x))


def compiled(layer):
    """The layer compiled to whole graphs, and for each graph how many convolutions it has."""
    counts = []

    def keep(graph, _):
        counts.append(sum(node.target is torch.conv2d for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend=keep), counts


@pytest.mark.parametrize(("channels", "shape", "convolutions"), [(1, IMAGE, 1), (64, (2, 64, 56, 56), 3)])
def test_both_ways_compile_to_one_graph(channels, shape, convolutions):
    layer, x = layers.CPConv2d(channels, 64, 3, rank=8), torch.randn(shape)
    run, counts = compiled(layer)
    torch.testing.assert_close(run(x), layer(x))
    assert counts == [convolutions] == [len(layer._grouping(x))]


def test_batches_of_any_size_are_not_compiled_one_by_one():
    layer = layers.CPConv2d(1, 10, 3, rank=6)
    run, counts = compiled(layer)
    for batch in (2, 5, 64, 65, 130, 131):
        x = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(run(x), layer(x))
    assert counts[:2] == [1, 3]  # the first shape is scheduled; once the batch is a symbol, it is the chain
    assert len(counts) <= 3


def test_a_copied_and_a_moved_layer_schedules_as_before():
    layer = layers.CPConv2d(1, 10, 3, rank=6)
    x = torch.randn(2, 1, 8, 8)
    layer(x)
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).double()):
        torch.testing.assert_close(other(x.to(other.up.weight.dtype)).float(), layer(x))
        assert other._grouping(x.to(other.up.weight.dtype)) == layer._grouping(x)


def test_what_is_a_chain_anyway_takes_the_short_way_and_is_the_same():
    chain, rebuilt = layers.CPConv2d(256, 256, 3, rank=256), layers.CPConv2d(1, 10, 3, rank=6)
    x, image = torch.randn(1, 256, 14, 14), torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        for layer, given in ((chain, x), (rebuilt, image)):
            torch.testing.assert_close(layer(given), layer(given), rtol=0, atol=0)
        assert chain._unmerged == {(x.shape, x.dtype)}
        assert not rebuilt._unmerged
        seen = []
        chain.down.register_forward_hook(lambda *call: seen.append(call))
        chain(x)
        assert len(seen) == 1  # what is changed afterwards is still called
    chain(x)[0, 0, 0, 0].backward()
    assert chain.up.weight.grad is not None


def test_symbols_for_shapes_are_traced_after_a_call_with_numbers():
    layer = layers.CPConv2d(256, 256, 3, rank=256)
    x = torch.randn(2, 256, 6, 6)
    with torch.no_grad():
        for given in (x[:1], x):
            layer(given)
        program = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(program(x[:1]), layer(x[:1]))
