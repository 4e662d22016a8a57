"""Are layers timed as the model calls them, once each, kept between runs, and interpolated soundly?"""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import part_of
from cases_models import CalledTwice, convnet, mlp
from cases_timing import FakeClock, seconds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfold as rf
from rankfold.errors import DataError
from rankfold.latency import Timing, fastest_layout, time_layers
from rankfold.latency import _layers as timings
from rankfold.latency import _race as latency
from rankfold.latency._cache import cache_file, cache_folder, read_cases, write_cases
from rankfold.latency._layers import _Case, _Input
from rankfold.stats import CallTime, Curve, LayerTime, LayerTimes, Setting, coordinates

SETTING = Setting("eager", 1, "cpu", "a processor", "2.6")
IMAGES = torch.ones(2, 3, 8, 8)


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(timings, "time_models", fake)
    return fake


def timed(model, example, **options):
    options = {"timing": Timing(cache=False), **options}
    return time_layers(model, rf.measure(model, example=example), example=example, **options).times


# --- curves

positive = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(positive, min_size=1, max_size=6), st.integers(1, 16))
def test_a_curve_rises(shares, grain):
    axis = tuple(float(8 * k) for k in range(1, len(shares) + 1))
    curve = Curve("svd", {}, (axis,), tuple(shares), grain)
    values = [curve.share(rank) for rank in range(1, 100)]
    assert all(a <= b * (1 + 1e-12) for a, b in zip(values, values[1:], strict=False))
    assert min(shares) * (1 - 1e-9) <= values[0]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(positive, min_size=6, max_size=6))
def test_a_table_of_pairs_rises_in_both(shares):
    curve = Curve("tucker", {}, ((4.0, 8.0), (3.0, 6.0, 9.0)), tuple(shares))
    values = np.array([[curve.share((a, b)) for b in range(1, 12)] for a in range(1, 12)])
    assert (np.diff(values, axis=0) >= -1e-9 * values[1:]).all()
    assert (np.diff(values, axis=1) >= -1e-9 * values[:, 1:]).all()


def test_what_was_measured_is_given_back_where_it_rises():
    curve = Curve("tucker", {}, ((4.0, 8.0), (3.0, 6.0)), (0.1, 0.2, 0.3, 0.6))
    measured = [curve.share(rank) for rank in ((4, 3), (4, 6), (8, 3), (8, 6))]
    assert measured == pytest.approx([0.1, 0.2, 0.3, 0.6])
    assert curve.share((6, 3)) == pytest.approx(0.2)


def test_a_larger_rank_that_is_not_slower_costs_no_more():
    curve = Curve("svd", {}, ((16.0, 32.0, 48.0),), (0.5, 0.3, 0.8))
    assert curve.share(16) == curve.share(32) == pytest.approx(0.4)


def test_ranks_within_a_step_take_the_same_time():
    curve = Curve("svd", {}, ((16.0, 32.0),), (0.2, 0.4), grain=16)
    assert curve.share(17) == curve.share(32) == pytest.approx(0.4)


def test_the_last_measured_rank_may_be_no_whole_step():
    curve = Curve("tucker", {}, ((16.0, 32.0), (3.0,)), (0.2, 0.4), grain=16)
    assert curve.share((32, 3)) == pytest.approx(0.4)


def test_beyond_the_measured_ranks():
    curve = Curve("svd", {}, ((10.0, 20.0),), (0.2, 0.4))
    assert curve.share(1) == pytest.approx(0.2)
    assert curve.share(30) == pytest.approx(0.6)
    assert Curve("svd", {}, ((10.0,),), (0.2,)).share(30) == pytest.approx(0.6)


def test_long_ranks_lie_along_their_mean():
    assert coordinates(7) == (7.0,)
    assert coordinates((3, 5)) == (3.0, 5.0)
    assert coordinates((2, 4, 8)) == pytest.approx((4.0,))


@pytest.mark.parametrize(
    ("axes", "shares", "grain"),
    [
        ((), (), 1),
        (((2.0, 1.0),), (0.1, 0.2), 1),
        (((0.0, 1.0),), (0.1, 0.2), 1),
        (((1.0, 2.0),), (0.1,), 1),
        (((1.0,),), (0.0,), 1),
        (((1.0,),), (float("nan"),), 1),
        (((1.0,),), (0.1,), 0),
    ],
)
def test_a_curve_that_is_none_is_refused(axes, shares, grain):
    with pytest.raises(DataError):
        Curve("svd", {}, axes, shares, grain)


def test_the_time_of_a_layer_is_that_of_all_its_calls():
    def curve(share, grain):
        return Curve("svd", {}, ((12.0,),), (share,), grain)

    layer = LayerTime((CallTime(1.0, 2, (curve(0.5, 4),)), CallTime(3.0, 1, (curve(0.1, 6),))))
    assert layer.dense == 5.0
    assert layer.seconds("svd", {}, 12) == pytest.approx(2 * 0.5 + 0.3)
    assert layer.seconds("cp", {}, 12) is None
    assert layer.grain("svd", {}) == 12
    assert layer.scaled(2.0).seconds("svd", {}, 12) == pytest.approx(2.6)


# --- the cache

CASES = {"Linear": CallTime(0.25, 1, (Curve("svd", {"split": "spatial"}, ((4.0, 8.0),), (0.5, 0.75), 4),))}


def test_times_there_and_back(tmp_path):
    path = cache_file(tmp_path / "new", SETTING)
    write_cases(path, SETTING, CASES)
    assert read_cases(path, SETTING) == CASES


def test_every_setting_has_its_file(tmp_path):
    others = [
        SETTING,
        Setting("eager", 2, "cpu", "a processor", "2.6"),
        Setting("eager", 1, "cpu", "another", "2.6"),
        Setting("eager", 1, "cpu", "a processor", "2.7"),
        Setting("onnxruntime", 1, "cpu", "a processor", "2.6", "1.20"),
    ]
    assert len({cache_file(tmp_path, setting) for setting in others}) == len(others)


def test_another_allocator_is_another_setting(monkeypatch):
    model, x = mlp(8, 8), torch.ones(2, 8)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    before = timed(model, x).setting
    assert timed(model, x).setting == before
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    after = timed(model, x).setting
    assert after != before
    assert "MALLOC_MMAP_THRESHOLD_=1000000" in after.hardware


def _good():
    curve = {"method": "svd", "options": {}, "axes": [[4, 8]], "shares": [0.5, 0.7], "grain": 1}
    setting = {"runtime": "eager", "threads": 1, "device": "cpu", "hardware": "a processor", "torch": "2.6"}
    return {
        "rankfold_timings": 1,
        "setting": {**setting, "library": ""},
        "cases": {"a": {"dense": 0.1, "curves": [curve]}},
    }


def _changed(**curve):
    data = _good()
    data["cases"]["a"]["curves"][0].update(curve)
    return data


HOSTILE = {
    "no JSON": "{",
    "binary": "\x00\xff",
    "deep": "[" * 100_000,
    "a list": "[]",
    "other version": json.dumps({**_good(), "rankfold_timings": 2}),
    "stale": json.dumps({**_good(), "setting": {**_good()["setting"], "torch": "1.0"}}),
    "no cases": json.dumps({**_good(), "cases": 3}),
    "dense of zero": json.dumps({**_good(), "cases": {"a": {"dense": 0.0, "curves": []}}}),
    "dense a flag": json.dumps({**_good(), "cases": {"a": {"dense": True, "curves": []}}}),
    "dense not finite": json.dumps({**_good(), "cases": {"a": {"dense": float("inf"), "curves": []}}}),
    "method": json.dumps(_changed(method=3)),
    "options": json.dumps(_changed(options=[1])),
    "axes": json.dumps(_changed(axes=[[8, 4]])),
    "shares": json.dumps(_changed(shares=[0.5])),
    "share not a number": json.dumps(_changed(shares=[0.5, None])),
    "huge rank": json.dumps(_changed(axes=[[4, 10**400]])),
    "grain": json.dumps(_changed(grain=10**6)),
}


def test_the_good_one_is_read(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(_good()))
    assert list(read_cases(path, SETTING)) == ["a"]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_cache_is_told_and_ignored(case, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(HOSTILE[case], encoding="latin-1")
    with pytest.warns(UserWarning, match="ignored and measured again"):
        assert read_cases(path, SETTING) == {}


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        write_cases(tmp_path / "file" / "times.json", SETTING, CASES)


def test_the_cache_is_where_the_system_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "rankfold"


def test_kept_times_are_not_measured_again(clock, tmp_path):
    model, x = mlp(64, 64), torch.ones(2, 64)
    first = timed(model, x, timing=Timing(cache=tmp_path))
    races = len(clock.races)
    second = timed(model, x, timing=Timing(cache=tmp_path))
    assert len(clock.races) == races + 1  # the whole model
    assert second.layers == first.layers
    timed(model, x, timing=Timing(cache=tmp_path, threads=2))
    assert len(clock.races) > races + 2
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_measurement_is_taken_up(monkeypatch, tmp_path):
    def interrupted(model):
        if isinstance(model, nn.Linear) and model.in_features == 64 and model.out_features == 32:
            raise KeyboardInterrupt
        return seconds(model)

    model, x = mlp(64, 64, 32), torch.ones(2, 64)
    monkeypatch.setattr(timings, "time_models", FakeClock(interrupted))
    with pytest.raises(KeyboardInterrupt):
        timed(model, x, timing=Timing(cache=tmp_path))
    clock = FakeClock()
    monkeypatch.setattr(timings, "time_models", clock)
    assert set(timed(model, x, timing=Timing(cache=tmp_path)).layers) == {"0", "1"}
    assert [models["dense"].out_features for models, _ in clock.races if "dense" in models] == [32]


def test_a_runtime_of_the_users_own_is_not_kept(clock, tmp_path):
    def mine(model, example):
        return lambda: model(example)

    timed(mlp(64, 64), torch.ones(2, 64), timing=Timing(cache=tmp_path, runtime=mine))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_where_that_is_switched_off(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timed(mlp(64, 64), torch.ones(2, 64))
    assert list(tmp_path.iterdir()) == []


# --- layers


def test_identical_layers_are_timed_once(clock):
    times = timed(mlp(64, 64, 64, 64), torch.ones(2, 64))
    assert len({layer.dense for layer in times.layers.values()}) == 1
    assert len([models for models, _ in clock.races if "dense" in models]) == 1
    assert set(times.layers) == {"0", "1", "2"}


def test_other_shapes_are_timed_anew(clock):
    timed(mlp(64, 64, 32), torch.ones(2, 64))
    assert len([models for models, _ in clock.races if "dense" in models]) == 2


def test_a_layer_that_is_called_twice_takes_twice_as_long(clock):
    times = timed(CalledTwice(), torch.ones(2, 32))
    assert times.layers["body"].calls[0].count == 2
    assert times.layers["body"].dense == 2 * times.layers["body"].calls[0].dense


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layers_are_timed_as_the_model_calls_them(clock, layout):
    model = convnet().to(memory_format=layout)
    timed(model, IMAGES.to(memory_format=layout))
    seen = {tuple(x.shape): x for models, x in clock.races if "dense" in models}
    assert set(seen) == {(2, 3, 8, 8), (2, 16, 8, 8), (2, 128), (2, 40)}
    assert seen[2, 16, 8, 8].is_contiguous(memory_format=layout)
    forms = [form for models, x in clock.races if x.shape == (2, 16, 8, 8) for form in models.values()]
    kernels = [p for form in forms for p in form.parameters() if p.dim() == 4 and p[0, 0].numel() > 1 < p.shape[1]]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)


def test_half_precision_is_timed_in_half_precision(clock):
    timed(mlp(64, 64).bfloat16(), torch.ones(2, 64, dtype=torch.bfloat16))
    assert {x.dtype for models, x in clock.races if "dense" in models} == {torch.bfloat16}


def test_tokens_are_timed_as_tokens(clock):
    model = nn.Sequential(nn.Embedding(200, 32), nn.Linear(32, 32))
    times = timed(model, torch.zeros(1, 4, dtype=torch.long))
    assert set(times.layers) == {"0", "1"}


def test_steps_of_the_hardware_are_found(monkeypatch):
    monkeypatch.setattr(timings, "time_models", FakeClock(functools.partial(seconds, grain=16)))
    times = timed(mlp(512, 512), torch.ones(2, 512))
    assert times.layers["0"].grain("svd", {}) == 16
    ranks = times.layers["0"].calls[0].curves[0].axes[0]
    assert all(rank % 16 == 0 for rank in ranks)


def test_where_there_are_no_steps_none_are_found(clock):
    assert timed(mlp(512, 512), torch.ones(2, 512)).layers["0"].grain("svd", {}) == 1


def test_narrow_layers_get_narrower_steps(monkeypatch):
    monkeypatch.setattr(timings, "time_models", FakeClock(functools.partial(seconds, grain=16)))
    times = timed(mlp(512, 512, 64), torch.ones(2, 512))
    assert times.layers["1"].grain("svd", {}) < 16 or len(times.layers["1"].calls[0].curves[0].axes[0]) > 2


def test_time_is_bounded_and_the_largest_layers_come_first(clock, monkeypatch):
    spent = iter(range(1000))
    monkeypatch.setattr(timings.time, "perf_counter", lambda: float(next(spent)))
    times = timed(mlp(32, 64, 512, 512), torch.ones(2, 32), timing=Timing(cache=False, seconds=1.5))
    assert set(times.layers) == {"2"}
    assert "1.5 s" in times.left_out["0"]


def test_layers_take_no_longer_than_their_model(monkeypatch):
    def cost(model):
        return seconds(model) / (4 if isinstance(model, nn.Sequential) else 1)

    monkeypatch.setattr(timings, "time_models", FakeClock(cost))
    times = timed(mlp(64, 64, 64), torch.ones(2, 64))
    assert sum(layer.dense for layer in times.layers.values()) == pytest.approx(times.whole)


def test_the_table_can_be_read(clock):
    text = str(timed(convnet(), IMAGES))
    assert "whole model" in text
    assert "svd (split=spatial)" in text
    assert str(LayerTimes({}, 0.5, SETTING, {"fc": "late"})).endswith("fc: late")


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = mlp(8, 8)
    stats = rf.Stats({}, 0, 0, 1)
    with pytest.raises(DataError, match="meta"):
        time_layers(model, stats, example=torch.ones(1, 8))


def test_statistics_of_another_model_are_refused(clock):
    with pytest.raises(DataError, match="another model"):
        time_layers(
            mlp(8, 8),
            rf.measure(nn.ReLU(), example=torch.ones(1)),
            example=torch.ones(1, 8),
            timing=Timing(cache=False),
        )


@pytest.mark.parametrize("options", [{"runtime": "tpu"}, {"threads": 0}, {"seconds": 0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(DataError):
        Timing(**options)


@pytest.mark.parametrize("runtime", ["eager", "compile", "onnxruntime"])
def test_real_layers_in_every_runtime(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(timings, "_whole", lambda *_: 1.0)  # to compile or export a whole model takes seconds
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(1, 16, 8, 8)
    times = timed(model, x, timing=Timing(runtime=runtime, cache=tmp_path, threads=1))
    assert times.setting.runtime == runtime
    assert {curve.method for curve in times.layers["0"].calls[0].curves} == {"svd", "tucker"}


@pytest.mark.parametrize("methods", ["svd", "tucker", "cp", "tt"])
def test_new_layers_lie_in_memory_as_the_old_ones(methods):
    model, x = convnet().eval(), torch.randn(2, 3, 8, 8)
    last = convnet().eval().to(memory_format=torch.channels_last)
    last.load_state_dict(model.state_dict())
    plan = rf.plan(model, budget=rf.Budget(params=0.9), methods=methods, include=("0", "3"))
    plain, small = rf.apply(model, plan), rf.apply(last, plan)
    torch.testing.assert_close(small(x), plain(x), rtol=1e-4, atol=1e-5)
    for name, choice in plan.layers.items():
        for stage in small.get_submodule(name).modules() if choice.method != "dense" else ():
            if isinstance(stage, nn.Conv2d) and stage.kernel_size != (1, 1):
                assert stage.weight.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "new",
    [rf.layers.LowRankConv2d, rf.layers.TuckerConv2d, rf.layers.CPConv2d, rf.layers.SVDConv2d],
    ids=lambda c: c.__name__,
)
def test_maps_lie_in_memory_as_those_of_the_old_layer(new, channels):
    dense, x = nn.Conv2d(channels, 6, 3).to(memory_format=torch.channels_last), torch.randn(2, channels, 8, 8)
    for options in new.variants(dense):
        for rank in {new.full_rank(dense, **options), part_of(new.full_rank(dense, **options))}:
            layer = new.like(dense, rank=rank, **options)
            assert layer(x).stride() == dense(x).stride(), (rank, options)
            assert layer.eval()(x).stride() == dense(x).stride(), (rank, options)
            assert layer.to_dense().weight.stride() == dense.weight.stride(), (rank, options)


def test_what_is_cut_from_an_svd_form_lies_in_memory_as_it():
    dense = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    layer = rf.layers.SVDConv2d.from_dense(dense, rank=6).truncated(3)
    assert layer.down.weight.stride(1) == 1


def test_kernels_of_three_axes_lie_in_memory_as_the_old_ones():
    dense = nn.Conv3d(3, 6, 3).to(memory_format=torch.channels_last_3d)
    for new in (rf.layers.LowRankConv3d, rf.layers.TuckerConv3d, rf.layers.CPConv3d, rf.layers.SVDConv3d):
        layer = new.like(dense, rank=part_of(new.full_rank(dense)))
        kernels = [stage.weight for stage in layer.modules() if isinstance(stage, nn.Conv3d)]
        telling = [kernel.stride(1) == 1 for kernel in kernels if math.prod(kernel.shape[2:]) > 1]
        assert telling and all(telling), new


def test_times_tell_the_formats_of_one_input_channel_apart():
    layers = [nn.Conv2d(1, 6, 3).to(memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last)]
    first, second = (_Case(layer, _Input.of(torch.randn(2, 1, 8, 8)), ()).key for layer in layers)
    assert first != second


def test_a_layout_is_chosen():
    assert fastest_layout(convnet(), IMAGES) in (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    ("ratio", "layout"),
    [(1.2, torch.channels_last), (0.95, torch.channels_last), (0.85, torch.contiguous_format)],
)
def test_channels_last_is_taken_unless_it_is_clearly_slower(monkeypatch, ratio, layout):
    timed = dict(zip(("contiguous", "channels last"), (SimpleNamespace(ratio=x) for x in (1.0, ratio)), strict=True))
    monkeypatch.setattr(latency, "time_models", lambda models, *_, **__: {name: timed[name] for name in models})
    assert fastest_layout(convnet(), IMAGES) is layout


def test_a_model_of_one_layout_is_not_timed(monkeypatch):
    monkeypatch.setattr(latency, "time_models", None)
    assert fastest_layout(nn.Linear(4, 4), torch.ones(1, 4)) is torch.contiguous_format
