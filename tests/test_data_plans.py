"""Are plans made from data true, better on that data than plans from weights, and carried out as they were made?"""

import itertools
import json
import math

import pytest
import torch
from cases_models import convnet, same_state, state, told
from torch import nn

import rankfold as rf
from rankfold._common import output_error
from rankfold.errors import PlanError
from rankfold.pipeline import measure_damage
from rankfold.planning import METRICS, candidates

HALF = rf.Budget(params=0.5)


def uneven(count, size, *, seed=0):
    """Inputs whose directions differ much in size, turned, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -2, size, dtype=torch.float64)
    values = torch.randn(count, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return (values * scales @ turn + 0.02).float()


def squared(output, target):
    return (output - target).square().sum()


def batches(size, *, count=8, outputs=10, seed=0):
    inputs = uneven(256 * count, size, seed=seed).split(256)
    targets = torch.randn(count, 256, outputs, generator=torch.Generator().manual_seed(seed))
    return list(zip(inputs, targets, strict=True))


def classifier():
    """A network with the layers' sizes of a small classifier; ReLUs between them."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


MODEL, DATA = classifier(), batches(48)
STATS = rf.measure(MODEL, DATA, moments=True, loss=squared)


def planned(metric, **arguments):
    return rf.plan(MODEL, stats=STATS, **told(**{"methods": "svd", "budget": HALF, "metric": metric, **arguments}))


# --- predictions and choices


@pytest.mark.parametrize("metric", ["weights", "outputs"])
@pytest.mark.parametrize("rank", [2, 7, 13])
def test_the_predicted_error_of_one_linear_layer_is_the_measured_one(metric, rank):
    model = nn.Sequential(nn.Linear(32, 24, bias=False))
    data = [uneven(4096, 32)] if metric == "outputs" else [torch.linalg.qr(torch.randn(64, 32)).Q]
    stats = rf.measure(model, data, moments=True)
    found = candidates(model, stats=stats, planning=rf.Planning(metric=metric, methods="svd"))
    [choice] = [choice for choice in found.layers["0"] if choice.rank == rank]
    plan = rf.Plan({"0": choice}, metric=metric)
    small = rf.apply(model, plan, stats=stats)
    assert plan.output_error == pytest.approx(output_error(model, small, data), rel=0.05)
    assert 0 < plan.output_error < 1


def test_in_the_outputs_the_error_is_smaller_than_that_of_the_best_weight():
    model = nn.Sequential(nn.Linear(32, 24))
    data = [uneven(4096, 32)]
    stats = rf.measure(model, data, moments=True)
    errors = []
    for metric in ("weights", "outputs"):
        plan = rf.plan(model, budget=HALF, stats=stats, planning=rf.Planning(metric=metric))
        errors.append(output_error(model, rf.apply(model, plan, stats=stats), data))
    assert errors[1] < 0.5 * errors[0]


class Halves(nn.Module):
    """Two layers of the same weights; the inputs of the first lie in few directions."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(32, 32), nn.Linear(32, 32)
        self.wide.load_state_dict(self.narrow.state_dict())

    def forward(self, x):
        few = x[:, :3] @ torch.ones(3, 32).tril()
        return self.narrow(few) + self.wide(x)


def test_the_ranks_go_where_the_outputs_need_them():
    model, data = Halves(), [torch.randn(512, 32)]
    stats = rf.measure(model, data, moments=True)
    blind = rf.plan(model, budget=rf.Budget(params=0.7), stats=stats, planning=rf.Planning(metric="weights"))
    sighted = rf.plan(model, budget=rf.Budget(params=0.7), stats=stats)
    assert blind.metric == "weights"
    assert sighted.metric == "outputs"
    assert 3 <= sighted.layers["narrow"].rank < 8
    assert sighted.layers["wide"].method == "dense"
    errors = [output_error(model, rf.apply(model, plan, stats=stats), data) for plan in (blind, sighted)]
    assert errors[1] < 1e-3 < 0.1 < errors[0]


def test_errors_fall_with_the_budget_and_the_whole_is_predicted():
    shares = (0.3, 0.5, 0.7, 0.9)
    plans = [planned("outputs", budget=rf.Budget(params=share)) for share in shares]
    measured = [output_error(MODEL, rf.apply(MODEL, plan, stats=STATS), DATA) for plan in plans]
    predicted = [plan.output_error for plan in plans]
    assert predicted == sorted(predicted, reverse=True)
    assert measured == sorted(measured, reverse=True)
    for guess, truth in zip(predicted, measured, strict=True):
        assert 0.7 * truth < guess < 1.4 * truth


def test_inputs_that_hardly_vary_are_planned_by_what_varies():
    model, x = nn.Sequential(nn.Linear(24, 24)), 10 + 0.01 * uneven(512, 24)
    stats = rf.measure(model, [x], moments=True)
    plan = rf.plan(model, budget=HALF, stats=stats)
    small = rf.apply(model, plan, stats=stats)
    assert plan.output_error == pytest.approx(output_error(model, small, [x]), rel=0.1)


# --- the table of metrics


def test_every_metric_decomposes_in_its_own_way():
    layers = {}
    for metric in METRICS:
        plan = planned(metric, rule="uniform")
        assert plan.metric == metric
        assert {choice.rank for choice in plan.layers.values()} == {c.rank for c in planned("weights", rule="uniform").layers.values()}  # fmt: skip  # noqa: E501
        layers[metric] = rf.apply(MODEL, plan, stats=STATS)[0].weight.detach()
    for one, other in itertools.combinations(layers, 2):
        assert not torch.allclose(layers[one], layers[other], rtol=1e-3, atol=1e-4), (one, other)


def truncated(matrix, rank):
    left, values, right = torch.linalg.svd(matrix)
    return left[:, :rank] * values[:rank] @ right[:rank]


def by_definition(metric, weight, moments, rank):
    """The published forms, each with its own scaling and inverse."""
    if metric == "whitening":
        scale = torch.linalg.cholesky(moments.second[0])
        return truncated(weight @ scale, rank) @ torch.linalg.inv(scale)
    if metric == "asvd":
        scale = moments.second[0].diagonal().sqrt().sqrt()  # (mean |x|)^0.5, the mean taken as a root mean square
        return truncated(weight * scale, rank) / scale
    scale = moments.output_weights.sqrt()[:, None]
    return truncated(weight * scale, rank) / scale


@pytest.mark.parametrize("metric", ["whitening", "asvd", "fwsvd"])
def test_published_rules_are_those_of_their_definitions(metric):
    # as many inputs as leave nothing to shrink
    stats = rf.measure(MODEL, batches(48, count=64), moments=True, loss=squared)
    plan = rf.Plan({"0": rf.Choice("svd", rank=9)}, metric=metric)
    layer = rf.apply(MODEL, plan, stats=stats)[0]
    expected = by_definition(metric, MODEL[0].weight.detach().double(), stats.layers["0"].moments, 9)
    assert float((layer.weight.detach().double() - expected).norm() / expected.norm()) < 5e-3
    torch.testing.assert_close(layer.bias, MODEL[0].bias)


def test_the_bias_takes_up_the_mean_in_the_outputs():
    layer = rf.apply(MODEL, rf.Plan({"0": rf.Choice("svd", rank=4)}, metric="outputs"), stats=STATS)[0]
    x = torch.cat([inputs for inputs, _ in DATA])
    torch.testing.assert_close(layer(x).mean(0), MODEL[0](x).mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["squares", "energy"])
def test_objectives_change_the_sum_and_not_the_errors(objective):
    plan = planned("outputs", objective=objective)
    assert plan.objective == objective
    for choice in plan.layers.values():
        expected = None if objective == "squares" else -math.log(1 - choice.error**2)
        assert choice.damage == pytest.approx(expected)


@pytest.mark.parametrize(("objective", "power"), [("loss", 1), ("tempered", 0.5)])
def test_the_loss_weighs_a_layer_by_its_gradients(objective, power):
    plan = planned("fisher", objective=objective, budget=rf.Budget(params=0.9))
    for name, choice in plan.layers.items():
        layer, moments = MODEL.get_submodule(name), STATS.layers[name].moments
        metric = STATS.metric(name, weighted=True)
        centred = metric.second[0] - torch.outer(metric.mean[0], metric.mean[0])
        weight = layer.weight.detach().double()
        energy = (weight @ centred * weight).sum(1) @ moments.output_weights
        assert choice.damage == pytest.approx(float(energy) ** power * choice.error**2, rel=1e-5)


# --- what is refused


PLAIN = rf.measure(MODEL, DATA)
WITHOUT_LOSS = rf.measure(MODEL, DATA, moments=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "best"}, "metric must be 'auto', 'weights', 'outputs', .*, got 'best'"),
        ({"metric": "outputs", "stats": PLAIN}, r"measure\(model, loader, moments=True\)"),
        ({"metric": "whitening", "stats": None}, r"measure\(model, loader, moments=True\)"),
        ({"metric": "fisher", "stats": WITHOUT_LOSS}, r"gradients of a loss.*loss=…\)"),
        ({"metric": "fwsvd", "stats": WITHOUT_LOSS}, r"gradients of a loss.*loss=…\)"),
        ({"metric": "outputs", "rule": "uniform", "init": "random"}, "no weight is read"),
        ({"objective": "best"}, "objective must be 'auto', 'squares', .*, got 'best'"),
        ({"objective": "calibrated"}, "objective 'calibrated' .*pass a loader"),
        ({"objective": "loss", "metric": "outputs"}, "'loss' needs metric='fisher'"),
        ({"objective": "tempered", "metric": "weights"}, "'tempered' needs metric='fisher'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        rf.plan(MODEL, **told(**{"budget": HALF, "stats": STATS, **arguments}))


def test_a_plan_of_outputs_is_not_applied_without_its_statistics():
    plan = planned("outputs")
    with pytest.raises(PlanError, match="'outputs'.*moments=True"):
        rf.apply(MODEL, plan)
    with pytest.raises(PlanError, match="moments=True"):
        rf.apply(MODEL, plan, stats=PLAIN)
    other = rf.measure(classifier()[:3], [x for x, _ in DATA], moments=True)
    with pytest.raises(PlanError, match="another model"):
        rf.apply(MODEL, plan, stats=other)
    assert rf.apply(MODEL, plan, init="random")[0].rank == plan.layers["0"].rank


# --- layers that have no inputs in the statistics


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(100, 32), nn.Linear(32, 32)

    def forward(self, tokens):
        return self.body(self.table(tokens))


def test_what_has_no_inputs_is_planned_on_weights_and_says_so():
    model, tokens = Words(), torch.randint(100, (64, 12))
    stats = rf.measure(model, [tokens], moments=True)
    plan = rf.plan(model, budget=rf.Budget(params=0.4), stats=stats)
    assert (plan.metric, plan.layers["table"].metric, plan.layers["body"].metric) == ("outputs", "weights", "")
    assert "error of the weights" in str(plan)
    small = rf.apply(model, rf.Plan.from_json(plan.to_json()), stats=stats)
    expected = rf.layers.LowRankEmbedding.from_dense(model.table, rank=plan.layers["table"].rank)
    torch.testing.assert_close(small.table.weight, expected.weight)


def test_what_has_no_gradients_is_not_weighed_by_the_loss():
    model, tokens = Words(), torch.randint(100, (64, 12))
    stats = rf.measure(model, [(tokens, torch.zeros(64, 12, 32))], moments=True, loss=squared)
    arguments = {"budget": rf.Budget(params=0.9), "stats": stats, "metric": "fisher", "objective": "loss"}
    with pytest.raises(PlanError, match=r"layer 'table': .* exclude=\('table',\)"):
        rf.plan(model, **told(**arguments))
    assert rf.plan(model, **told(**arguments, exclude="table")).layers["body"].damage > 0


def test_a_layer_that_lost_its_inputs_is_refused():
    plan = planned("outputs")
    poor = rf.measure(MODEL, DATA, moments=True, memory=8 * 45 * 45)
    assert poor.left_out
    assert any(layer.moments for layer in poor.layers.values())
    with pytest.raises(PlanError, match="hold none of its inputs"):
        rf.apply(MODEL, plan, stats=poor)


# --- plain data


def test_json_there_and_back():
    pairs = [("weights", "squares"), ("outputs", "energy"), ("fisher", "loss"), ("fisher", "tempered")]
    for metric, objective in pairs:
        plan = planned(metric, objective=objective)
        assert rf.Plan.from_json(plan.to_json()) == plan
        head = json.loads(plan.to_json())
        assert ("metric" in head, "objective" in head) == (metric != "weights", objective != "squares")
        assert (head["planning"]["metric"], head["planning"]["objective"]) == (metric, objective)


@pytest.mark.parametrize("change", [{"metric": "best"}, {"metric": 3}, {"objective": "none"}, {"objective": ["a"]}])
def test_a_bad_word_in_a_plan_is_refused(change):
    words = ", ".join(f'"{key}": {value!r}'.replace("'", '"') for key, value in change.items())
    with pytest.raises(PlanError, match="must be"):
        rf.Plan.from_json('{"rankfold": 1, ' + words + ', "layers": {}}')
    if "metric" in change:
        with pytest.raises(PlanError, match="metric"):
            rf.Plan.from_json('{"rankfold": 1, "layers": {"0": {"method": "svd", "rank": 1, ' + words + "}}}")


def test_a_model_from_data_is_saved_and_loaded(tmp_path):
    plan = planned("outputs")
    small = rf.apply(MODEL, plan, stats=STATS)
    rf.save(small, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", classifier())
    torch.testing.assert_close(loaded.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert rf.store.read_plan(tmp_path / "small.safetensors") == plan


# --- candidates


@pytest.mark.parametrize("rule", ["optimal", "uniform", "energy", "evbmf"])
@pytest.mark.parametrize("metric", ["weights", "outputs"])
def test_candidates_serve_several_budgets(rule, metric):
    found = candidates(MODEL, quantities="params", stats=STATS, planning=rf.Planning(metric=metric, rule=rule))
    for share in (0.8, 0.5):
        budget = rf.Budget(params=share)
        plan = rf.plan(MODEL, budget=budget, stats=STATS, planning=rf.Planning(metric=metric, rule=rule))
        assert found.plan(budget) == plan
        assert plan.params <= share * plan.dense.params
    with pytest.raises(PlanError, match="for a budget on params, not on macs"):
        found.plan(rf.Budget(macs=0.5))
    with pytest.raises(PlanError, match="not on nothing|needs a budget"):
        found.plan()


def test_in_the_outputs_the_energy_rule_keeps_the_same_energy_everywhere():
    plan = planned("outputs", rule="energy", budget=rf.Budget(params=0.4))
    errors = [choice.error for choice in plan.layers.values() if choice.method != "dense"]
    assert len(errors) >= 2
    assert max(errors) - min(errors) < 0.1


# --- calibrated on measured points


def test_calibrated_damage_is_what_the_model_shows():
    found = candidates(MODEL, stats=STATS, planning=rf.Planning(methods="svd"))
    measured = measure_damage(found, MODEL, DATA, stats=STATS, points=(0.1, 0.4))
    for name, choices in measured.layers.items():
        assert choices[0].damage == 0
        damages = [choice.damage for choice in sorted(choices, key=lambda choice: choice.error)]
        assert damages == sorted(damages)
        for point in (0.1, 0.4):
            choice = min(choices[1:], key=lambda choice: abs(math.log(choice.error / point)))
            small = rf.apply(MODEL, rf.Plan({name: choice}, metric="outputs"), stats=STATS)
            assert choice.damage == pytest.approx(output_error(MODEL, small, DATA) ** 2, rel=1e-6), name
    plan = measured.plan(rf.Budget(params=0.6))
    assert plan.objective == "calibrated"
    assert "from measured points" in str(plan)
    assert rf.Plan.from_json(plan.to_json()) == plan
    truth = output_error(MODEL, rf.apply(MODEL, plan, stats=STATS), DATA)
    assert 0.7 * truth < plan.output_error < 1.4 * truth


class Faint(Halves):
    """Of two equal layers one hardly counts in the end."""

    def __init__(self, loud):
        super().__init__()
        self.gains = {name: 1.0 if name == loud else 0.01 for name in ("narrow", "wide")}

    def forward(self, x):
        return self.gains["narrow"] * self.narrow(x) + self.gains["wide"] * self.wide(x)


@pytest.mark.parametrize("loud", ["narrow", "wide"])
def test_calibration_finds_the_layer_that_matters(loud):
    model, data = Faint(loud), [torch.randn(512, 32)]
    stats = rf.measure(model, data, moments=True)
    found = measure_damage(candidates(model, stats=stats), model, data, stats=stats)
    plan = found.plan(rf.Budget(params=0.7))
    assert plan.layers[loud].method == "dense"
    assert output_error(model, rf.apply(model, plan, stats=stats), data) < 0.02


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"points": ()}, PlanError, "points"),
        ({"points": (0.1, 0.0)}, PlanError, "points"),
        ({"loader": []}, rf.RankfoldError, "empty"),
        ({"loader": [DATA[0][0][:1]]}, rf.RankfoldError, "more than one example"),
        ({"found": candidates(MODEL, planning=rf.Planning(rule="uniform", init="random"))}, PlanError, "no errors"),
        ({"stats": None}, PlanError, "moments=True"),
    ],
)
def test_bad_calibrations_are_refused(arguments, error, message):
    found = candidates(MODEL, stats=STATS, planning=rf.Planning(methods="svd"))
    with pytest.raises(error, match=message):
        measure_damage(**{"found": found, "model": MODEL, "loader": DATA, "stats": STATS, **arguments})


# --- in one call


def test_compressing_with_data_beats_compressing_weights():
    held_out = batches(48, seed=0)[:2]
    blind, _ = rf.compress(MODEL, DATA, budget=HALF, planning=rf.Planning(metric="weights", recalibrate=False))
    sighted, plan = rf.compress(MODEL, DATA, budget=HALF, planning=rf.Planning(recalibrate=False))
    assert plan.metric == "outputs"
    assert output_error(MODEL, sighted, held_out) < 0.7 * output_error(MODEL, blind, held_out)


def test_with_an_example_the_weights_alone_count():
    _, plan = rf.compress(MODEL, example=DATA[0][0], budget=HALF)
    assert plan.metric == "weights"
    with pytest.raises(PlanError, match="moments=True"):
        rf.compress(MODEL, example=DATA[0][0], budget=HALF, planning=rf.Planning(metric="outputs"))


def test_a_calibrated_plan_in_one_call():
    arguments = {"budget": HALF, "objective": "calibrated", "recalibrate": False}
    small, plan = rf.compress(MODEL, DATA, **told(**arguments))
    assert plan.objective == "calibrated"
    found = measure_damage(candidates(MODEL, stats=STATS), MODEL, DATA[:4], stats=STATS)
    assert plan.layers == found.plan(HALF).layers
    assert output_error(MODEL, small, DATA) == pytest.approx(plan.output_error, rel=0.4)
    with pytest.raises(PlanError, match="pass a loader"):
        rf.compress(MODEL, example=DATA[0][0], **told(**arguments))
    with pytest.raises(PlanError, match="needs a budget"):
        rf.compress(MODEL, DATA, planning=rf.Planning(objective="calibrated"))


def test_statistics_may_be_given():
    small, plan = rf.compress(MODEL, stats=STATS, budget=HALF)
    assert plan == rf.plan(MODEL, stats=STATS, budget=HALF)
    torch.testing.assert_close(small.state_dict(), rf.apply(MODEL, plan, stats=STATS).state_dict())


def test_an_iterator_is_read_as_often_as_it_takes():
    model = convnet()
    images = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    expected = rf.compress(model, images, budget=HALF)
    found = rf.compress(model, iter(images), budget=HALF)
    assert found[1] == expected[1]
    torch.testing.assert_close(found[0].state_dict(), expected[0].state_dict())


def test_batchnorm_is_re_estimated_only_where_that_helps():
    model = convnet()
    images = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    rf.train.reestimate_batchnorm(model, images)
    model.eval()
    arguments = {"budget": rf.Budget(params=0.3), "metric": "weights", "recalibrate": False}
    kept, _ = rf.compress(model, images, **told(**arguments, batchnorm=False))
    found, _ = rf.compress(model, images, **told(**arguments))
    assert output_error(model, found, images) <= output_error(model, kept, images)
    torch.testing.assert_close(kept[1].running_mean, model[1].running_mean)
    # what the statistics are of is better kept where the data are of another kind than those they were made from
    shifted = [image + 3 for image in images]
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.running_var.fill_(25.0)
    kept, _ = rf.compress(model, shifted, budget=rf.Budget(params=0.9), planning=rf.Planning(recalibrate=False))
    assert float(kept[1].running_var.min()) == 25.0


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interruption_leaves_the_model_as_it_was(stop):
    model = convnet().train()
    before = state(model)

    class Interrupted:
        def __iter__(self):
            for number in itertools.count():
                if number == stop:
                    raise KeyboardInterrupt
                yield torch.randn(8, 3, 8, 8)

    with pytest.raises(KeyboardInterrupt):
        rf.compress(model, Interrupted(), budget=HALF)
    same_state(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
