"""Is a budget on latency or bytes kept: by the table, by the whole model, and never by a slower one?"""

import json
from importlib.metadata import version

import pytest
import torch
from cases_models import CalledTwice, convnet, encoder, mlp
from cases_timing import FakeClock, seconds
from torch import nn

import rankfold as rf
from rankfold.errors import DataError, PlanError
from rankfold.latency import RUNTIMES, RuntimeRow, Timing, eager, time_layers
from rankfold.latency import _layers as timings
from rankfold.latency._runtimes import runtime_of
from rankfold.pipeline import _latency_check as promises
from rankfold.pipeline import plan_in_time
from rankfold.planning import Measured, candidates
from rankfold.stats import CallTime, Curve, LayerTime, LayerTimes, Setting, count_bytes

SETTING = Setting("eager", 1, "cpu", "a processor", "2.6")
X = torch.randn(2, 64)
NO_CACHE = Timing(cache=False)


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(timings, "time_models", fake)
    monkeypatch.setattr(promises, "time_models", fake)
    return fake


def whole(monkeypatch, kept):
    """Let the whole model keep the given shares of the dense latency, one after the other."""
    shares, small = iter(kept), {}

    def cost(model):
        known = small.setdefault(id(model), (model, None if id(model) == dense_id[0] else next(shares)))[1]
        return 1.0 if known is None else known

    dense_id = [0]
    fake = FakeClock(cost)

    def timer(models, example, **options):
        dense_id[0] = id(next(iter(models.values())))
        return fake(models, example, **options)

    monkeypatch.setattr(promises, "time_models", timer)
    return fake


def table(model, shares=((16, 0.2), (32, 0.6)), grain=1, dense=1.0, rest=0.0):
    """Return statistics with the same curve for every linear layer."""
    ranks, values = zip(*shares, strict=True)
    layer = LayerTime((CallTime(dense, 1, (Curve("svd", {}, (ranks,), values, grain),)),))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    times = LayerTimes(dict.fromkeys(names, layer), dense * len(names) + rest, SETTING)
    stats = rf.measure(model, example=torch.ones(1, model[0].in_features))
    return rf.Stats(stats.layers, stats.params, stats.macs, stats.batch_size, times=times)


# --- by the table


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_the_sum_of_the_table_is_within_the_budget(share):
    model = mlp(64, 64, 64, 64)
    plan = rf.plan(model, budget=rf.Budget(latency=share), stats=table(model, rest=0.1), methods="svd")
    assert plan.dense.latency == pytest.approx(3.1)
    assert plan.latency <= share * plan.dense.latency * (1 + 1e-9)
    assert plan.latency == pytest.approx(0.1 + sum(choice.latency for choice in plan.layers.values()))


def test_less_latency_more_error():
    model = mlp(64, 64, 64, 64)
    plans = [rf.plan(model, budget=rf.Budget(latency=x), stats=table(model)) for x in (0.3, 0.5, 0.7, 1)]
    errors = [plan.error for plan in plans]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_a_layer_that_is_not_faster_stays_dense_and_says_so():
    model = mlp(64, 64, 64)
    stats = table(model)
    slow = LayerTime((CallTime(1.0, 1, (Curve("svd", {}, ((16, 32),), (1.1, 1.5)),)),))
    times = LayerTimes({**stats.times.layers, "1": slow}, 2.0, SETTING)
    stats = rf.Stats(stats.layers, stats.params, stats.macs, 1, times=times)
    plan = rf.plan(model, budget=rf.Budget(latency=0.7), stats=stats)
    assert plan.layers["0"].method == "svd"
    assert plan.layers["1"].reason == "no rank of svd or tucker was measured faster than the layer itself"


def test_where_nothing_is_faster_the_plan_stays_dense_and_the_error_says_why():
    model = mlp(64, 64, 64)
    stats = table(model, ((16, 1.2), (32, 1.4)))
    assert all(c.method == "dense" for c in rf.plan(model, budget=rf.Budget(latency=1), stats=stats).layers.values())
    with pytest.raises(rf.BudgetError, match=r"closest reachable is latency=1\.0000.*measured faster"):
        rf.plan(model, budget=rf.Budget(latency=0.5), stats=stats)


def test_an_impossible_budget_says_the_closest_reachable():
    model = mlp(64, 64, 64)
    stats = table(model, rest=0.5)
    with pytest.raises(rf.BudgetError, match="closest reachable") as caught:
        rf.plan(model, budget=rf.Budget(latency=0.01), stats=stats)
    fraction = float(str(caught.value).split("reachable is latency=")[1].split()[0])
    assert rf.plan(model, budget=rf.Budget(latency=fraction), stats=stats).latency <= fraction * 2.5


def test_ranks_lie_at_the_end_of_a_step():
    model = mlp(64, 64, 64, 64)
    plan = rf.plan(model, budget=rf.Budget(latency=0.6), stats=table(model, grain=8), methods="svd")
    ranks = [choice.rank for choice in plan.layers.values() if choice.rank]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


def test_a_dominated_rank_is_not_chosen():
    model = mlp(64, 64)
    stats = table(model, ((8, 0.5), (16, 0.5), (24, 0.5), (30, 0.9)))
    assert rf.plan(model, budget=rf.Budget(latency=0.5), stats=stats, methods="svd").layers["0"].rank == 24


def test_layers_that_were_not_timed_stay_dense():
    model = mlp(64, 64, 64)
    stats = table(model)
    times = LayerTimes({"0": stats.times.layers["0"]}, 2.0, SETTING, {"1": "not timed: too late"})
    stats = rf.Stats(stats.layers, stats.params, stats.macs, 1, times=times)
    plan = rf.plan(model, budget=rf.Budget(latency=0.8), stats=stats)
    assert plan.layers["1"].reason == "not timed: too late"
    assert plan.latency <= 1.6


@pytest.mark.parametrize("rule", ["optimal", "uniform", "energy", "evbmf"])
def test_both_budgets_at_once(rule):
    model = mlp(64, 64, 64, 64)
    budget = rf.Budget(latency=0.6, macs=0.7, bytes=0.65)
    plan = rf.plan(model, budget=budget, stats=table(model), methods="svd", planning=rf.Planning(rule=rule))
    assert plan.latency <= 0.6 * plan.dense.latency * (1 + 1e-9)
    assert plan.macs <= 0.7 * plan.dense.macs
    assert plan.bytes <= 0.65 * plan.dense.bytes


def test_latency_without_times_is_refused():
    model = mlp(64, 64)
    with pytest.raises(PlanError, match="time_layers"):
        candidates(model, quantities="latency", stats=rf.measure(model, example=X))
    with pytest.raises(rf.RankfoldError, match="pass example=… or a loader"):
        rf.plan(model, budget=rf.Budget(latency=0.5), stats=rf.measure(model, example=X))


def test_a_layer_called_twice_is_planned_with_both_calls(clock):
    model, x = CalledTwice(), torch.ones(4, 32)
    stats = time_layers(model, rf.measure(model, example=x), example=x, timing=NO_CACHE)
    plan = rf.plan(model, budget=rf.Budget(latency=1), stats=stats)
    assert plan.layers["body"].dense.latency == stats.times.layers["body"].dense


# --- by the whole model


def promised(monkeypatch, kept, share=0.5, **limits):
    model = mlp(64, 64, 64, 64)
    fake = whole(monkeypatch, kept)
    budget = rf.Budget(latency=share, **limits)
    found = candidates(model, quantities=tuple(budget.limits), stats=table(model), planning=rf.Planning(methods="svd"))
    return found, fake, lambda: plan_in_time(model, found, budget, example=X, timing=NO_CACHE)


def test_a_promise_that_is_kept_is_the_plan(monkeypatch):
    found, fake, run = promised(monkeypatch, [0.5])
    plan = run()
    assert len(fake.races) == 1
    assert plan.layers == found.plan(rf.Budget(latency=0.5)).layers
    assert plan.measured.kept == 0.5


def test_a_promise_that_is_not_kept_is_repaired(monkeypatch):
    found, fake, run = promised(monkeypatch, [0.6, 0.49])
    plan = run()
    assert len(fake.races) == 2
    assert plan.measured.kept == 0.49
    # Four fifths of the saving came true: with this in mind the plan promises what is asked for.
    assert plan.latency <= 0.5 * plan.dense.latency * (1 + 1e-9)
    assert plan.error > found.plan(rf.Budget(latency=0.5)).error


def test_a_promise_that_is_more_than_kept_is_spent(monkeypatch):
    found, _, run = promised(monkeypatch, [0.3, 0.5])
    assert run().error < found.plan(rf.Budget(latency=0.5)).error


def test_a_plan_that_kept_it_is_returned_where_a_bolder_one_does_not(monkeypatch):
    found, _, run = promised(monkeypatch, [0.3, 0.7, 0.9])
    plan = run()
    assert plan.measured.kept == 0.3
    assert plan.layers == found.plan(rf.Budget(latency=0.5)).layers


def test_so_many_tries_and_no_more(monkeypatch):
    _, fake, run = promised(monkeypatch, [0.6, 0.59, 0.58, 0.57, 0.56])
    with pytest.raises(rf.BudgetError, match=r"closest reachable is latency=0\.57"):
        run()
    assert len(fake.races) == promises.TRIES


def test_what_no_longer_fits_once_corrected_says_the_closest_that_was_measured(monkeypatch):
    _, fake, run = promised(monkeypatch, [0.7, 0.56])
    with pytest.raises(
        rf.BudgetError, match=r"latency=0\.5 .* closest reachable is latency=0\.560\d \(measured"
    ) as caught:
        run()
    assert len(fake.races) == 2
    assert caught.value.closest.measured.kept == 0.56


def test_what_the_layers_can_not_promise_is_returned_where_the_model_keeps_it(monkeypatch):
    _, fake, run = promised(monkeypatch, [0.16], share=0.15)
    with pytest.raises(rf.BudgetError, match=r"closest reachable is latency=0\.1600 \(measured"):
        run()
    _, fake, run = promised(monkeypatch, [0.15], share=0.15)
    plan = run()
    assert (plan.measured.kept, plan.budget, len(fake.races)) == (0.15, rf.Budget(latency=0.15), 1)
    assert plan.latency > 0.15 * plan.dense.latency


def test_between_a_plan_that_is_late_and_one_that_is_early_there_is_another(monkeypatch):
    # late; the closest, since the layers now can't promise it, is far too early; half way from a saving of 0.5 to 0.79
    found, fake, run = promised(monkeypatch, [0.7, 0.3, 0.5])
    plan = run()
    assert (len(fake.races), plan.measured.kept) == (3, 0.5)
    expected = found.plan(rf.Budget(latency=1 - (0.5 + 0.79) / 2))
    assert plan.error == pytest.approx(expected.error, rel=0.02)
    assert found.plan(rf.Budget(latency=0.5)).error < 0.9 * plan.error


def test_where_another_quantity_is_in_the_way_nothing_is_timed(monkeypatch):
    _, fake, run = promised(monkeypatch, [], share=0.1, params=0.001)
    with pytest.raises(rf.BudgetError, match=r"closest reachable is params="):
        run()
    assert not fake.races


def test_never_slower_than_dense(monkeypatch):
    _, _, run = promised(monkeypatch, [1.3, 1.2, 1.1], share=0.99)
    with pytest.raises(rf.BudgetError, match="closest reachable"):
        run()


def test_what_is_slower_is_not_returned_though_the_budget_would_tolerate_it(monkeypatch):
    _, _, run = promised(monkeypatch, [1.02, 1.02, 1.02], share=0.98)
    with pytest.raises(rf.BudgetError):
        run()


def test_a_dense_plan_needs_no_measurement(monkeypatch):
    _, fake, run = promised(monkeypatch, [], share=1.0)
    plan = run()
    assert (plan.measured, fake.races) == (None, [])
    assert plan.error == 0


def test_where_another_limit_decides_it_is_not_tried_again(monkeypatch):
    _, fake, run = promised(monkeypatch, [0.3, 0.3, 0.3], share=0.9, params=0.3)
    plan = run()
    assert len(fake.races) == 1
    assert plan.params <= 0.3 * plan.dense.params


def test_a_budget_without_latency_is_refused():
    model = mlp(64, 64)
    with pytest.raises(PlanError, match="within a latency"):
        plan_in_time(model, candidates(model), rf.Budget(params=0.5), example=X)


# --- in one call


@pytest.mark.parametrize(
    ("model", "example"),
    [(mlp(64, 64, 64), X), (convnet(), torch.randn(2, 3, 8, 8)), (encoder(), torch.randn(2, 5, 32))],
    ids=["mlp", "convnet", "transformer"],
)
def test_compress_keeps_a_latency(clock, model, example):
    small, plan = rf.compress(model, example=example, budget=rf.Budget(latency=0.9), timing=NO_CACHE)
    assert plan.measured.kept == pytest.approx(seconds(small) / seconds(model))
    assert plan.measured.kept <= 0.9 * promises.TOLERATED
    small(example)


def test_an_overhead_that_only_the_whole_model_has_is_found(clock, monkeypatch):
    monkeypatch.setattr(promises, "time_models", FakeClock(lambda model: seconds(model, overhead=1e-6) + 4e-6))
    model = mlp(64, 64, 64, 64)
    _, plan = rf.compress(model, example=X, budget=rf.Budget(latency=0.8), methods="svd", timing=NO_CACHE)
    assert plan.measured.kept <= 0.8 * promises.TOLERATED


def test_the_first_batch_of_a_loader_is_timed(clock):
    rf.compress(mlp(64, 64, 64), [X, X], budget=rf.Budget(latency=0.9), timing=NO_CACHE)
    assert {tuple(x.shape) for models, x in clock.races if "dense" in models and "small" not in models} == {(2, 64)}


def test_an_example_beside_a_loader_is_timed_instead(clock):
    arguments = {"example": X[:1], "budget": rf.Budget(latency=0.9), "timing": NO_CACHE}
    rf.compress(mlp(64, 64, 64), [X, X], **arguments)
    assert {tuple(x.shape) for models, x in clock.races if "dense" in models and "small" not in models} == {(1, 64)}


def test_times_that_were_measured_before_are_used(clock):
    model = mlp(64, 64, 64)
    stats = time_layers(model, rf.measure(model, example=X), example=X, timing=NO_CACHE)
    before = len(clock.races)
    rf.compress(model, example=X, stats=stats, budget=rf.Budget(latency=0.9))
    assert all("small" in models for models, _ in clock.races[before:])


def test_without_an_example_there_is_nothing_to_time():
    model = mlp(64, 64)
    with pytest.raises(DataError, match="example"):
        rf.compress(model, stats=rf.measure(model, example=X), budget=rf.Budget(latency=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "compile", "onnxruntime"])
def test_whole_models_are_compared_in_every_runtime(runtime):
    model, x = convnet(), torch.randn(2, 3, 8, 8)
    plan = rf.plan(model, budget=rf.Budget(params=0.5))
    measured = promises._measured(model, plan, x, Timing(runtime=runtime, threads=1))
    assert measured.kept > 0
    assert measured.setting == f"{runtime}, cpu, 1 thread"


# --- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("methods", ["svd", "tucker", "tt"])
def test_bytes_are_those_of_what_is_saved(methods, dtype, tmp_path):
    model = convnet()
    model[3].to(dtype)
    plan = rf.plan(model, budget=rf.Budget(bytes=0.8), methods=methods)
    small = rf.apply(model, plan)
    assert (
        plan.dense.bytes == count_bytes(model) == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    )
    assert plan.bytes == count_bytes(small) <= 0.8 * plan.dense.bytes
    rf.save(small, plan, tmp_path / "small.safetensors")
    assert 0 < (tmp_path / "small.safetensors").stat().st_size - plan.bytes < 20_000


def test_buffers_and_ties_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert count_bytes(model) == 4 * (64 + 4 * 8) + 8


def test_a_budget_of_bytes_prefers_wide_numbers():
    model = mlp(64, 64, 64)
    model[0].double()
    plan = rf.plan(model, budget=rf.Budget(bytes=0.8), methods="svd")
    assert plan.layers["0"].bytes < plan.layers["0"].dense.bytes == 8 * (64 * 64 + 64)


# --- plain data


def measured_plan():
    model = mlp(64, 64, 64)
    plan = rf.plan(model, budget=rf.Budget(latency=0.6, bytes=0.9), stats=table(model))
    return rf.Plan(**{**vars(plan), "measured": Measured(0.61, 2.0, "eager, cpu, 1 thread")})


def test_json_there_and_back():
    plan = measured_plan()
    assert rf.Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["budget"] == {"bytes": 0.9, "latency": 0.6}


@pytest.mark.parametrize(
    "change",
    [
        {"dense_latency": -1.0},
        {"dense_latency": "fast"},
        {"dense_bytes": 1.5},
        {"measured": 0.5},
        {"measured": {"kept": 0.5}},
        {"measured": {"kept": 0.0, "dense_seconds": 1.0, "setting": ""}},
        {"measured": {"kept": 0.5, "dense_seconds": True, "setting": ""}},
        {"measured": {"kept": 0.5, "dense_seconds": 1.0, "setting": 3}},
        {"layers": {"0": {"method": "dense", "latency": -0.1}}},
        {"layers": {"0": {"method": "dense", "bytes": 0.5}}},
    ],
    ids=str,
)
def test_damaged_json_is_refused(change):
    data = {**json.loads(measured_plan().to_json()), **change}
    with pytest.raises(PlanError):
        rf.Plan.from_json(json.dumps(data))


def test_a_plan_prints_what_was_promised_and_what_was_measured():
    text = str(measured_plan())
    assert f"latency: 2000 ms -> {1e3 * measured_plan().latency:.4g} ms" in text
    assert "measured: 2000 ms -> 1220 ms (61.0% kept; eager, cpu, 1 thread)" in text
    assert "bytes" in text.splitlines()[0]
    assert "latency" not in str(rf.plan(mlp(64, 64), budget=rf.Budget(params=0.9)))


def test_a_report_says_what_was_promised(clock):
    model = mlp(64, 64, 64)
    small, plan = rf.compress(model, example=X, budget=rf.Budget(latency=0.9), timing=NO_CACHE)
    report = rf.report(model, small, plan, example=X, latency=False)
    assert report.conditions["promised latency"] == f"{plan.latency / plan.dense.latency:.1%} of dense"
    assert [row.bytes for row in report.rows] == [plan.dense.bytes, plan.bytes]


def test_editing_keeps_what_is_known_of_the_dense_layer():
    plan = measured_plan().with_choice("0", rf.Choice("svd", rank=2, amounts=rf.planning.Amounts(1, 1, 4, 0.25)))
    assert plan.layers["0"].dense.latency == 1.0
    assert plan.latency == pytest.approx(plan.layers["1"].latency + 0.25)


class Rehearsal(FakeClock):
    """The same clock, which also runs every model once."""

    def __call__(self, models, example, *, runtime="eager", **options):
        for model in models.values():
            runtime_of(runtime).model(model, example)()
        return super().__call__(models, example, runtime=runtime, **options)


def test_a_runtime_is_one_row(monkeypatch, tmp_path):
    ran = {"model": 0, "layer": 0}

    def counting(kind):
        def mine(model, example):
            ran[kind] += 1
            return eager(model, example)

        return mine

    row = RuntimeRow(counting("model"), counting("layer"), library="numpy")
    monkeypatch.setattr("rankfold.latency._runtimes.RUNTIMES", {**RUNTIMES, "mine": row})
    clock = Rehearsal()
    for place in (timings, promises):
        monkeypatch.setattr(place, "time_models", clock)
    model, timing = mlp(64, 64, 64).eval(), Timing("mine", cache=tmp_path)
    times = time_layers(model, rf.measure(model, example=X), example=X, timing=timing).times
    assert (times.setting.runtime, times.setting.library) == ("mine", version("numpy"))
    assert ran["model"] == 1
    assert ran["layer"] > 2
    small, plan = rf.compress(model, example=X, budget=rf.Budget(latency=0.6), timing=timing)
    assert plan.measured.setting.startswith("mine")
    assert plan.latency <= 0.6 * plan.dense.latency
    assert ran["model"] > 1
