"""Is a plan within its budget, optimal, complete with reasons, and plain data?"""

import itertools
import json
import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases_models import Attention, CalledTwice, TiedThrice, WithDict, convnet, encoder, mlp, params, told
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfold as rf
from rankfold.errors import PlanError
from rankfold.layers import LowRankLinear

IMAGES = torch.ones(2, 3, 8, 8)
CONVNET = convnet()
STATS = rf.measure(CONVNET, example=IMAGES)
RULES = ["optimal", "uniform", "energy", "evbmf"]
METHODS = [("svd",), ("tucker",), ("cp",), ("tt",), ("svd", "tucker")]


def planned(**arguments):
    return rf.plan(CONVNET, **told(**{"stats": STATS, "budget": rf.Budget(params=0.5), **arguments}))


# --- within the budget, and true


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.5}, {"params": 0.6, "macs": 0.6}], ids=str)
def test_the_budget_is_met_and_predictions_are_true(rule, budget):
    plan = planned(budget=rf.Budget(**budget), rule=rule)
    small = rf.apply(CONVNET, plan)
    after = rf.measure(small, example=IMAGES)
    assert (after.params, after.macs) == (plan.params, plan.macs)
    for quantity, fraction in budget.items():
        assert getattr(after, quantity) <= fraction * getattr(STATS, quantity)
    for name, choice in plan.layers.items():
        old, new = CONVNET.get_submodule(name).weight, small.get_submodule(name).weight
        assert float((new - old).detach().norm() / old.detach().norm()) <= choice.error + 1e-5, name


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_every_method_can_be_planned_with(methods):
    plan = planned(methods=methods, budget=rf.Budget(params=0.9))
    used = {choice.method for choice in plan.layers.values()}
    assert used <= {"dense", *methods}
    assert used != {"dense"}


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    fraction=st.floats(0.2, 1.0),
    quantity=st.sampled_from(["params", "macs"]),
    rule=st.sampled_from(RULES),
    multiple=st.sampled_from([1, 2, 3, 8]),
)
def test_no_layer_grows(fraction, quantity, rule, multiple):
    try:
        plan = planned(budget=rf.Budget(**{quantity: fraction}), rule=rule, multiple=multiple)
    except rf.BudgetError:
        return
    assert plan.params <= plan.dense.params
    assert plan.macs <= plan.dense.macs
    for choice in plan.layers.values():
        assert choice.params <= choice.dense.params
        assert choice.macs <= choice.dense.macs
        assert choice.method == "dense" or choice.amounts[quantity] < choice.dense[quantity]


@pytest.mark.parametrize("limits", [{"params": 0.5}, {"macs": 0.35}, {"params": 0.6, "macs": 0.4}], ids=str)
def test_optimal_equals_brute_force(limits):
    model = mlp(9, 12, 7, 10)
    stats = rf.measure(model, example=torch.ones(1, 9))
    plan = rf.plan(model, budget=rf.Budget(**limits), stats=stats, methods="svd")
    options = []
    for name, layer in model.named_children():
        calls = stats.layers[name].calls
        ranks = LowRankLinear.rank_grid(layer)
        costs = [LowRankLinear.cost(layer, calls, rank=rank) for rank in ranks]
        kept = [(c.params, c.macs, e**2) for c, e in zip(costs, LowRankLinear.errors(layer, ranks), strict=True)]
        options.append([(stats.layers[name].params, stats.layers[name].macs, 0.0), *kept])
    best = math.inf
    for combination in itertools.product(*options):
        used_params, used_macs, damage = map(sum, zip(*combination, strict=True))
        fits = used_params <= limits.get("params", 1) * stats.params and used_macs <= limits.get("macs", 1) * stats.macs
        best = min(best, damage) if fits else best
    found = sum(choice.error**2 for choice in plan.layers.values())
    assert best * (1 - 1e-9) <= found <= best * (1 + 1e-4)  # the gap that the planner promises


@pytest.mark.parametrize("rule", ["uniform", "energy", "evbmf"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_no_rule_beats_the_optimal_one(rule, fraction):
    budget = rf.Budget(macs=fraction)
    assert planned(budget=budget).error <= planned(budget=budget, rule=rule).error + 0.01


def test_uniform_keeps_the_same_share_everywhere():
    model = mlp(64, 64, 64, 64)
    plan = rf.plan(model, budget=rf.Budget(params=0.5), planning=rf.Planning(rule="uniform"))
    assert len({choice.rank for choice in plan.layers.values()}) == 1


def test_energy_keeps_the_same_energy_everywhere():
    model = mlp(64, 64, 48, 40)
    plan = rf.plan(model, budget=rf.Budget(params=0.4), methods="svd", planning=rf.Planning(rule="energy"))
    errors = [choice.error for choice in plan.layers.values()]
    assert max(errors) - min(errors) < 0.05


def test_evbmf_finds_the_rank_under_noise():
    model = mlp(60, 80)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(80, 5) @ torch.randn(5, 60) + 0.01 * torch.randn(80, 60))
    plan = rf.plan(model, methods="svd", planning=rf.Planning(rule="evbmf"))
    assert plan.layers["0"].rank == 5
    assert plan.budget is None


def test_a_function_is_a_rule():
    def smallest(candidates, limits):
        assert limits == {}
        assert all(choices[0].method == "dense" for choices in candidates.values())
        return {name: min(choices, key=lambda choice: choice.params) for name, choices in candidates.items()}

    plan = planned(rule=smallest, budget=None)
    assert all(choice.params < choice.dense.params for choice in plan.layers.values() if choice.method != "dense")
    with pytest.raises(PlanError, match="one choice for each layer"):
        planned(rule=lambda *_: {})


def test_ranks_are_multiples():
    model = mlp(64, 64, 64)
    plan = rf.plan(model, budget=rf.Budget(params=0.5), planning=rf.Planning(multiple=8))
    assert all(choice.rank % 8 == 0 for choice in plan.layers.values() if choice.rank)
    assert any(choice.rank for choice in plan.layers.values())


def test_same_seed_same_plan_in_any_executor():
    plan = planned(methods=("svd", "cp"), budget=rf.Budget(params=0.8))
    assert planned(methods=("svd", "cp"), budget=rf.Budget(params=0.8)) == plan
    with ThreadPoolExecutor(2) as executor:
        assert planned(methods=("svd", "cp"), budget=rf.Budget(params=0.8), executor=executor) == plan


@pytest.mark.slow
def test_same_plan_from_processes():
    import multiprocessing

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert planned(executor=executor) == planned()
        torch.testing.assert_close(
            rf.apply(CONVNET, planned(), executor=executor).state_dict(), rf.apply(CONVNET, planned()).state_dict()
        )


def test_jobs_can_be_sent_to_processes():
    import pickle

    class Pickling(ThreadPoolExecutor):
        def map(self, fn, *iterables):
            return super().map(pickle.loads(pickle.dumps(fn)), *(pickle.loads(pickle.dumps(i)) for i in iterables))

    with Pickling(1) as executor:
        assert planned(executor=executor) == planned()
        assert params(rf.apply(CONVNET, planned(), executor=executor)) == planned().params


def test_planning_changes_neither_model_nor_random_state():
    before, random = {k: v.clone() for k, v in CONVNET.state_dict().items()}, torch.get_rng_state()
    planned(methods=("svd", "tucker", "cp"), budget=rf.Budget(params=0.8))
    torch.testing.assert_close(CONVNET.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


# --- every layer is named, with a reason where it stays dense


def test_every_factorisable_layer_is_named():
    plan = planned(include="3", budget=rf.Budget(params=0.95))
    assert set(plan.layers) == {"0", "3", "8", "10"}
    assert all(choice.reason for choice in plan.layers.values() if choice.method == "dense")
    assert plan.layers["8"].reason == "not included"


def _parametrised():
    model = mlp(32, 32, 32)
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _hooked():
    model = mlp(32, 32, 32)
    model[0].register_forward_hook(lambda *_: None)
    return model


class Mine(nn.Linear):
    """A user's own linear layer."""


SKIPPED = {
    "tied": (TiedThrice(), torch.zeros(1, 3, dtype=torch.long), "embed", "tied with 'head', 'other'"),
    "tied head": (TiedThrice(), torch.zeros(1, 3, dtype=torch.long), "head", "tied with 'embed', 'other'"),
    "not called": (WithDict(), {"x": torch.ones(1, 24), "scale": 1}, "unused", "not called"),
    "attention": (Attention(), torch.ones(1, 5, 32), "attend", ""),
    "parametrised": (_parametrised(), torch.ones(1, 32), "0", ""),
    "hooked": (_hooked(), torch.ones(1, 32), "0", "hook"),
    "subclass": (nn.Sequential(Mine(32, 32), nn.Linear(32, 32)), torch.ones(1, 32), "0", ""),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(8, 16, 3), nn.Conv2d(16, 16, 3)),
        torch.ones(1, 8, 8, 8),
        "0",
        "",
    ),
    "tiny": (mlp(32, 1, 32, 32), torch.ones(1, 32), "0", "less than the layer itself"),
    "factorised": (
        nn.Sequential(LowRankLinear(32, 32, rank=4), nn.Linear(32, 32)),
        torch.ones(1, 32),
        "0",
        "factorised already",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_may_not_be_replaced_is_skipped_with_its_reason(case):
    model, example, name, reason = SKIPPED[case]
    small, plan = rf.compress(model, example=example, budget=rf.Budget(params=0.95))
    assert plan.layers[name].method == "dense"
    assert plan.layers[name].reason
    assert reason in plan.layers[name].reason
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    small(*args, **kwargs)


def test_a_layer_on_meta_is_skipped():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta"))
    plan = rf.plan(model, budget=rf.Budget(params=0.8))
    assert "meta" in plan.layers["1"].reason


def test_a_lazy_layer_is_skipped():
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8))
    plan = rf.plan(model, budget=rf.Budget(params=0.5))
    assert plan.layers["0"].method == "svd"
    assert plan.layers.get("1") is None or plan.layers["1"].reason


def test_called_twice_is_planned_once():
    plan = rf.plan(CalledTwice(), budget=rf.Budget(params=0.6))
    assert set(plan.layers) == {"body", "head"}
    assert plan.layers["body"].method == "svd"


def test_without_statistics_no_macs_are_predicted():
    plan = rf.plan(CONVNET, budget=rf.Budget(params=0.5))
    assert plan.macs is None
    assert plan.params <= 0.5 * STATS.params
    assert "?" in str(plan)


def test_a_transformer_is_planned():
    plan = rf.plan(encoder(), budget=rf.Budget(params=0.7), stats=rf.measure(encoder(), example=torch.ones(1, 5, 32)))
    assert plan.layers["layers.0.linear1"].method == "svd"
    assert plan.layers["layers.0.self_attn"].reason


def test_an_embedding_may_be_factorised_for_its_parameters():
    model = nn.Sequential(nn.Embedding(200, 32), nn.Linear(32, 32))
    stats = rf.measure(model, example=torch.zeros(1, 4, dtype=torch.long))
    assert rf.plan(model, budget=rf.Budget(params=0.5), stats=stats).layers["0"].method == "svd"
    assert rf.plan(model, budget=rf.Budget(macs=0.5), stats=stats).layers["0"].method == "dense"


# --- include and exclude


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({"include": "8"}, {"8"}),
        ({"include": ["?"], "exclude": ("0", "3")}, {"8"}),
        ({"exclude": ["3", "1*", "0"]}, {"8"}),
    ],
)
def test_include_and_exclude(arguments, changed):
    plan = planned(budget=rf.Budget(params=0.9), **arguments)
    assert {name for name, choice in plan.layers.items() if choice.method != "dense"} == changed


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_name_that_matches_nothing_is_refused_with_near_names(argument):
    with pytest.raises(PlanError, match=r"'hed' matches no factorisable layer: did you mean 'head'"):
        rf.plan(CalledTwice(), budget=rf.Budget(params=0.5), **{argument: ["hed"]})


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": None}, "needs a budget"),
        ({"methods": ("svd", "pca")}, "method must be .*, got 'pca'"),
        ({"methods": ()}, "method"),
        ({"rule": "best"}, "rule must be .*, got 'best'"),
        ({"rule": "energy", "methods": "cp"}, "'cp' has no singular values"),
        ({"rule": "evbmf", "methods": ("svd", "cp")}, "'cp' has no singular values"),
        ({"multiple": 0}, "multiple"),
        ({"multiple": 1.5}, "multiple"),
        ({"stats": None, "budget": rf.Budget(macs=0.5)}, "measure"),
        ({"stats": rf.measure(mlp(4, 4), example=torch.ones(1, 4))}, "another model"),
        ({"stats": rf.measure(convnet(8), example=IMAGES)}, "another model"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        planned(**arguments)


@pytest.mark.parametrize(
    "limits", [{}, {"params": 0}, {"params": 1.1}, {"macs": "0.5"}, {"macs": True}, {"params": math.nan}]
)
def test_bad_budgets_are_refused(limits):
    with pytest.raises(rf.BudgetError):
        rf.Budget(**limits)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("quantity", ["params", "macs"])
def test_an_impossible_budget_says_the_closest_reachable(rule, quantity):
    with pytest.raises(rf.BudgetError, match="closest reachable") as caught:
        planned(budget=rf.Budget(**{quantity: 0.001}), rule=rule)
    fraction = float(str(caught.value).split(f"reachable is {quantity}=")[1].split()[0])
    plan = planned(budget=rf.Budget(**{quantity: fraction}), rule=rule)
    assert getattr(plan, quantity) <= fraction * getattr(STATS, quantity)
    with pytest.raises(rf.BudgetError):
        planned(budget=rf.Budget(**{quantity: fraction - 0.001}), rule=rule)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model = mlp(32, 32, 32)
    with torch.no_grad():
        model[1].weight[3, 4] = value
    with pytest.raises(rf.RankfoldError, match=r"layer '1' \(Linear\): its weight holds NaN or Inf"):
        rf.plan(model, budget=rf.Budget(params=0.8))
    assert rf.plan(model, budget=rf.Budget(params=0.8), exclude="1").layers["1"].reason == "excluded"


# --- plain data


def test_json_there_and_back():
    plan = planned(methods=("svd", "tucker"))
    assert rf.Plan.from_json(plan.to_json()) == plan


def test_json_form():
    plan = rf.Plan(
        {"a": rf.Choice("svd", 24, {"split": "spatial"}), "b": rf.Choice("dense", reason="no")}, rf.Budget(macs=0.5)
    )
    assert json.loads(plan.to_json()) == {
        "rankfold": 1,
        "budget": {"macs": 0.5},
        "layers": {
            "a": {"method": "svd", "split": "spatial", "rank": 24},
            "b": {"method": "dense", "reason": "no"},
        },
    }


GOOD = {"rankfold": 1, "budget": {"params": 0.5}, "layers": {"fc": {"method": "svd", "rank": 4}}}


def changed(**layer):
    return {**GOOD, "layers": {"fc": {**GOOD["layers"]["fc"], **layer}}}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {**GOOD, "rankfold": 2},
        {**GOOD, "rankfold": True},
        {**GOOD, "more": 1},
        {**GOOD, "layers": []},
        {**GOOD, "layers": {"fc": []}},
        {**GOOD, "layers": {"fc": {"rank": 4}}},
        {**GOOD, "budget": 0.5},
        {**GOOD, "budget": {"params": 2}},
        {**GOOD, "budget": {"seconds": 1}},
        {**GOOD, "dense_params": -1},
        {**GOOD, "dense_params": 1.5},
        changed(method="pca"),
        changed(method=["svd"]),
        changed(method="dense"),
        changed(rank=0),
        changed(rank=4.0),
        changed(rank=True),
        changed(rank=[]),
        changed(rank=[4, "4"]),
        changed(rank=None),
        changed(rank={"a": 1}),
        changed(colour="blue"),
        changed(split=0.5),
        changed(split={"a": 1}),
        changed(params=-1),
        changed(params="many"),
        changed(error=-0.1),
        changed(error=math.nan),
        changed(reason=1),
    ],
    ids=json.dumps,
)
def test_a_bad_plan_is_refused(data):
    with pytest.raises(PlanError):
        rf.Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", '{"rankfold": 1, "layers": {"a": 1, "a": 2}}'])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(PlanError):
        rf.Plan.from_json(text)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rankfold", "layers", "method", "rank", "fc"]), inner, max_size=3)))  # fmt: skip  # noqa: E501
def test_anything_is_a_plan_or_a_plan_error(data):
    with pytest.raises(PlanError):
        rf.Plan.from_json(json.dumps(data))


def test_editing_a_plan():
    plan = planned()
    name = next(name for name, choice in plan.layers.items() if choice.method != "dense")
    edited = plan.with_choice(name, rf.Choice("dense", reason="by hand"))
    assert edited.params == plan.params + plan.layers[name].dense.params - plan.layers[name].params
    assert plan.layers[name].method != "dense"
    assert plan.with_choice(name, rf.Choice("svd", rank=1)).params is None
    with pytest.raises(PlanError, match="no layer 'nose'"):
        plan.with_choice("nose", rf.Choice("dense"))


def test_printing_a_plan():
    text = str(planned())
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["0", "3", "8", "10"]
    assert "% kept)" in text
    widths = {line.index("MACs") for line in text.splitlines()[:1]}
    assert len(widths) == 1
    assert "root mean square" in text


def test_the_error_of_a_plan():
    plan = rf.Plan({"a": rf.Choice("svd", rank=1, error=0.6), "b": rf.Choice("dense")})
    assert plan.error == pytest.approx(math.sqrt(0.36 / 2))
    assert rf.Plan({"a": rf.Choice("svd", rank=1)}).error is None


# --- what was edited, and what belongs to whom


def edited(plan, change):
    data = json.loads(plan.to_json())
    change(data)
    return rf.Plan.from_json(json.dumps(data))


def first_changed(plan):
    return next(name for name, choice in plan.layers.items() if choice.method != "dense")


def test_no_error_of_another_rank_stays_with_an_edited_choice():
    plan = planned()
    name = first_changed(plan)
    other = replace(plan[name], rank=1 if isinstance(plan[name].rank, int) else (1,) * len(plan[name].rank))
    for made in (
        plan.with_choice(name, other),
        edited(plan, lambda data: data["layers"][name].update(rank=other.rank)),
    ):
        assert (made[name].error, made[name].params, made.error, made.params) == (None,) * 4
        assert made[name].dense == plan[name].dense
        small, counted = rf.compress(CONVNET, stats=STATS, plan=made)
        assert counted.params == params(small) and counted[name].error is None
        assert counted.macs == rf.measure(small, example=IMAGES).macs


def test_rows_that_were_swapped_are_of_nothing():
    plan = planned(methods="svd")
    one, two = list(plan.layers)[:2]

    def swap(data):
        data["layers"][one], data["layers"][two] = data["layers"][two], data["layers"][one]

    made = edited(plan, swap)
    assert made[one].error is made[two].error is made.params is None
    assert made[one].dense == made[two].dense == rf.planning.Amounts()


@pytest.mark.parametrize("change", [{"metric": "outputs"}, {"objective": "energy"}])
def test_an_error_is_of_the_metric_that_it_was_measured_in(change):
    plan = planned()
    made = edited(plan, lambda data: data.update(change))
    assert all(choice.error is None for choice in made.layers.values() if choice.method != "dense")


def test_the_plan_that_comes_back_says_how_the_model_was_made():
    batches = [IMAGES]
    plan = rf.plan(CONVNET, batches, budget=rf.Budget(params=0.5))
    other = rf.Planning(recalibrate=False, seed=7)
    small, made = rf.compress(CONVNET, batches, plan=plan, planning=other)
    assert (made.planning.recalibrate, made.planning.seed, made.planning.methods) == (False, 7, plan.planning.methods)
    again, same = rf.compress(CONVNET, batches, plan=made)
    assert same == made
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_statistics_of_another_model_are_refused_next_to_a_plan():
    plan, other = planned(), mlp(8, 8)
    stats = rf.measure(other, example=torch.ones(1, 8))
    for call in (lambda: plan.checked(CONVNET, stats), lambda: rf.compress(CONVNET, stats=stats, plan=plan)):
        with pytest.raises(PlanError, match="another model"):
            call()


def test_counting_refuses_what_building_refuses():
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
    for layer in model:
        layer.weight = model[0].weight
    plan = rf.Plan({str(k): rf.Choice("svd", rank=1) for k in range(3)})
    with pytest.raises(PlanError, match="tied"):
        plan.checked(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0.5}, r"rankfold.Budget\("),
        ({"plan": "plan.json"}, "from_json"),
        ({"planning": "svd"}, r"rankfold.Planning\("),
        ({"budget": rf.Budget(params=0.5), "planning": rf.Planning(rule=lambda *_: None)}, "a mapping"),
        (
            {
                "budget": rf.Budget(params=0.5),
                "planning": rf.Planning(rule=lambda some, _: {name: rf.Choice("svd", rank=2) for name in some}),
            },
            "that it was given",
        ),
    ],
)
def test_things_of_another_kind_are_refused_by_name(arguments, words):
    with pytest.raises(PlanError, match=words):
        rf.compress(CONVNET, stats=STATS, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(rankfold=1.0),
        lambda data: data.update(dense_params=10**400),
        lambda data: data["planning"].update(blocks={"0:2": 3}),
        lambda data: data["planning"].update(missing=["nothing"]),
        lambda data: data["layers"][next(iter(data["layers"]))].update(latency=10**400),
        lambda data: data["layers"][next(iter(data["layers"]))].update({"for": 3}),
    ],
)
def test_damage_is_refused(change):
    with pytest.raises(PlanError):
        edited(planned(), change)


def test_an_amount_of_numpy_can_be_saved():
    plan = planned(budget=rf.Budget(params=np.float32(0.5)), multiple=np.int64(2))
    assert rf.Plan.from_json(plan.to_json()) == plan
