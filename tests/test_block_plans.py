"""Does a layer for a block compete with what the block's layers could become, and is it built as it was found?"""

import itertools

import numpy as np
import pytest
import torch
from cases_models import params, told
from torch import nn
from torch.testing import assert_close

import rankfold as rf
from rankfold._common import output_error
from rankfold.errors import DataError, LayerError, PlanError
from rankfold.layers import FlexibleConv2d, FlexibleLinear
from rankfold.pipeline import _work, measure_damage
from rankfold.planning import SolvedBlock, candidates
from rankfold.planning._joint import STEP, _thinned
from rankfold.train import flexible_candidates
from rankfold.train.flexible._block_data import read_block
from rankfold.train.flexible._decouple import _usual_ranks


def bent(seed=0, into=12, out=10):
    """A block of 48 neurons that are three functions of one direction each, bent at many places."""
    generator = torch.Generator().manual_seed(seed)
    first, last = nn.Linear(into, 48), nn.Linear(48, out)
    with torch.no_grad():
        first.weight.copy_(torch.linalg.qr(torch.randn(into, 3, generator=generator)).Q.T.repeat(16, 1))
        first.bias.copy_(torch.randn(48, generator=generator))
        last.weight.copy_(torch.randn(48, generator=generator) * torch.randn(out, 3, generator=generator).repeat(1, 16))
    return [first, nn.ReLU(), last]


def network():
    torch.manual_seed(3)
    return nn.Sequential(*bent(), nn.Tanh(), nn.Linear(10, 8)).eval()


MODEL = network()
DATA = list(torch.randn(8, 100, 12, generator=torch.Generator().manual_seed(1)))
STATS = rf.measure(MODEL, DATA, moments=True)
LOW = rf.Budget(params=0.25)


def made(errors, into=12, out=10):
    """Layers of some ranks that were never solved, with the errors that are said of them."""
    return [SolvedBlock(FlexibleLinear(into, out, rank=rank, size=3), error) for rank, error in errors.items()]


MADE = {"0:2": made({8: 0.75, 4: 0.85, 2: 0.95})}


@pytest.fixture(scope="module")
def solved():
    return flexible_candidates(MODEL, "0:2", DATA, ranks=(3, 5), samples=300)


# --- the choice ---


def _all_combinations(found, names, quantities):
    """Return the cost and the damage of every way to treat some layers, one after the other."""
    choices = [found.layers.get(name, (found.whole.layers[name],)) for name in names]
    for combination in itertools.product(*choices):
        yield (
            [sum(getattr(c, q) for c in combination) for q in quantities],
            sum((c.error or 0) ** 2 for c in combination),
        )


@pytest.mark.parametrize("quantities", [("params",), ("params", "macs")], ids=len)
def test_the_plan_is_the_best_of_all_combinations(quantities):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 10), nn.Tanh(), nn.Linear(10, 8)).eval()
    stats = rf.measure(model, DATA, moments=True)
    found = candidates(model, quantities=quantities, stats=stats, blocks=MADE, planning=rf.Planning(methods="svd"))
    block = [([getattr(c, q) for q in quantities], c.error**2) for c in found.blocks["0:2"].choices]
    inside = [*_all_combinations(found, ("0", "2"), quantities), *block]
    outside = list(_all_combinations(found, ("4",), quantities))
    ways = [(np.add(a, b), x + y) for (a, x), (b, y) in itertools.product(inside, outside)]
    costs, damages = np.array([cost for cost, _ in ways]), np.array([damage for _, damage in ways])
    kinds = set()
    for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        plan = found.plan(rf.Budget(**dict.fromkeys(quantities, share)))
        fits = (costs <= [int(share * plan.dense[q]) for q in quantities]).all(axis=1)
        least = damages[fits].min()
        reached = sum((choice.error or 0) ** 2 for choice in plan.layers.values())
        assert least * (1 - 1e-9) <= reached <= least * (1 + 1e-4) + 1e-12
        kinds.add(tuple(choice.method for choice in plan.layers.values())[:-1])
    assert {("flexible",), ("svd", "svd")} <= kinds


def test_of_many_combinations_none_is_missed_by_more_than_the_step():
    generator = np.random.default_rng(0)
    costs = np.sort(generator.random(20_000))[:, None]
    damages = np.sort(10 ** generator.uniform(-8, 0, 20_000))[::-1].copy()
    damages[-1] = 0.0
    kept = _thinned(costs, damages)
    assert len(kept) < 700 and 19_999 in kept
    for k in range(0, 20_000, 500):
        assert (damages[kept[costs[kept, 0] <= costs[k, 0]]] <= STEP * damages[k]).any(), k
    few = _thinned(costs[::100], damages[::100])
    assert len(few) == 200


def test_the_block_wins_where_its_error_is_less_and_not_where_it_is_more():
    plans = {
        e: rf.plan(MODEL, budget=LOW, stats=STATS, planning=rf.Planning(blocks={"0:2": made({3: e})}))
        for e in (0.01, 0.999)
    }
    assert list(plans[0.01].layers) == ["0:2", "4"] and plans[0.01].layers["0:2"].rank == 3
    assert list(plans[0.999].layers) == ["0", "2", "4"]
    assert plans[0.999].layers == rf.plan(MODEL, budget=LOW, stats=STATS).layers
    free = rf.plan(MODEL, budget=rf.Budget(params=1.0), stats=STATS, planning=rf.Planning(blocks=MADE))
    assert list(free.layers) == ["0", "2", "4"] and free.error == 0


def test_what_a_block_costs_is_what_the_model_then_has(solved):
    plan = rf.plan(MODEL, budget=rf.Budget(macs=0.2, bytes=0.6), stats=STATS, planning=rf.Planning(blocks=solved))
    small = rf.apply(MODEL, plan, stats=STATS, blocks=solved)
    assert plan.layers["0:2"].method == "flexible"
    assert plan.params == params(small) and plan.bytes == sum(4 * p.numel() for p in small.parameters())
    assert plan.macs == rf.measure(small, example=DATA[0]).macs <= 0.2 * plan.dense.macs
    assert plan.layers["0:2"].dense.macs == 48 * 22


# --- what is built ---


def test_the_solved_layer_itself_is_built(solved, tmp_path):
    plan = rf.plan(MODEL, budget=LOW, stats=STATS, planning=rf.Planning(blocks=solved))
    again = rf.Plan.from_json(plan.to_json())
    assert again == plan and plan.params <= 0.25 * plan.dense.params
    small = rf.apply(MODEL, again, stats=STATS, blocks=solved)
    (chosen,) = [one for one in solved["0:2"] if one.layer.rank == plan.layers["0:2"].rank]
    assert small[0] is not chosen.layer
    assert_close(dict(small[0].state_dict()), dict(chosen.layer.state_dict()), rtol=0, atol=0)
    assert chosen.error == plan.layers["0:2"].error < 0.05
    rf.save(small, plan, tmp_path / "small.safetensors")
    assert_close(rf.load(tmp_path / "small.safetensors", network())(DATA[0]), small(DATA[0]), rtol=0, atol=0)
    held = rf.apply(MODEL, plan, stats=STATS)  # a plan in memory still has the layers that were solved
    assert_close(dict(held.state_dict()), dict(small.state_dict()), rtol=0, atol=0)
    with pytest.raises(PlanError, match="blocks="):
        rf.apply(MODEL, again, stats=STATS)
    with pytest.raises(PlanError, match="blocks=…"):
        rf.compress(MODEL, DATA, plan=again)
    with pytest.raises(PlanError, match="blocks="):
        rf.apply(MODEL, plan, stats=STATS, blocks={"0:2": made({40: 0.1})})


def test_in_one_call_it_is_better_than_without(solved):
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    runs = [
        rf.compress(MODEL, DATA, budget=LOW, planning=rf.Planning(blocks=solved, batchnorm=False)) for _ in range(2)
    ]
    small, plan = runs[0]
    assert torch.equal(small(DATA[0]), runs[1][0](DATA[0])) and plan == runs[1][1]
    assert plan.objective == "calibrated" and plan.layers["0:2"].method == "flexible"
    other, _ = rf.compress(MODEL, DATA, budget=LOW)
    assert output_error(MODEL, small, DATA) < 0.5 * output_error(MODEL, other, DATA)
    assert_close(dict(MODEL.state_dict()), before, rtol=0, atol=0)


def test_a_block_is_solved_by_name(monkeypatch):
    assert _work.ROWS == 20_000
    monkeypatch.setattr(_work, "ROWS", 0)
    monkeypatch.setattr("rankfold.train.flexible._decouple.RANK_DIVISORS", (4, 8))
    small, plan = rf.compress(
        MODEL, DATA, budget=rf.Budget(params=0.3), planning=rf.Planning(blocks="0:2", recalibrate=False)
    )
    assert plan.layers["0:2"].method == "flexible" and type(small[0]) is FlexibleLinear
    assert plan.params == params(small) <= 0.3 * params(MODEL)


def test_convolutions_with_a_normalisation_between_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 40, 1, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 6, 1)).eval()
    data = list(torch.randn(4, 8, 6, 5, 5))
    blocks = flexible_candidates(model, ["0:3"], data, ranks=(4,), samples=300)
    stats = rf.measure(model, data, moments=True)
    plan = rf.plan(model, budget=rf.Budget(params=0.4), stats=stats, planning=rf.Planning(blocks=blocks))
    small = rf.apply(model, plan, stats=stats, blocks=blocks)
    assert type(small[0]) is FlexibleConv2d and plan.dense.params == plan.layers["0:3"].dense.params
    assert plan.params == params(small)
    bad = {"0:3": [SolvedBlock(blocks["0:3"][0].layer, 0.999)]}
    for share in (0.5, 0.6, 0.7, 0.8):  # the parameters of the normalisation stay where its layers are factorised
        budget = rf.Budget(params=share)
        tried = rf.plan(model, budget=budget, stats=stats, planning=rf.Planning(blocks=bad))
        assert tried.layers == rf.plan(model, budget=budget, stats=stats).layers
    measured = output_error(model, small, list(torch.randn(4, 8, 6, 5, 5)))
    assert measured == pytest.approx(plan.layers["0:3"].error, rel=0.3)


def test_a_calibrated_block_counts_by_what_it_does_to_the_outputs(solved):
    found = candidates(MODEL, stats=STATS, blocks=solved)
    after = measure_damage(found, MODEL, DATA, stats=STATS)
    for choice, one in zip(after.blocks["0:2"].choices, solved["0:2"], strict=True):
        small = rf.apply(MODEL, rf.Plan({"0:2": choice}), blocks={"0:2": [one]})
        assert choice.damage == pytest.approx(output_error(MODEL, small, DATA) ** 2, rel=1e-6)
    assert after.plan(LOW).objective == "calibrated"


def test_a_search_tries_blocks_too(solved):
    def score(model):
        return -output_error(MODEL, model, DATA)

    found = rf.search(
        MODEL,
        DATA,
        evaluate=score,
        max_drop=0.05,
        margin=0,
        quantity="params",
        evaluations=6,
        planning=rf.Planning(blocks=solved),
    )
    assert found.plan.layers["0:2"].method == "flexible" and score(found.model) >= -0.05


def test_ranks_are_chosen_by_what_the_block_has():
    model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 20))
    block = read_block(model, "0:2")
    assert _usual_ranks(model, "0:2", block, {"basis": "legendre", "size": 3}) == [13, 6, 3, 1]  # 2460 // 44 is 55
    wide = nn.Sequential(nn.Linear(2000, 2000), nn.Tanh(), nn.Linear(2000, 2000))
    options = {"basis": "legendre", "size": 3}
    assert _usual_ranks(wide, "0:2", read_block(wide, "0:2"), options) == [256, 128, 64, 32, 16]


# --- what is refused ---

CONVS = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, stride=2))
CHAIN = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blocks": ("0:2",)}, "pass a loader"),
        ({"blocks": {"0:9": MADE["0:2"]}}, "no module '9'"),
        ({"blocks": {"0:2": MADE["0:2"], "2:4": made({2: 0.1}, 48, 8)}}, "'2' in common"),
        ({"blocks": {"0:2": []}}, "solved layers"),
        ({"blocks": {"0:2": made({2: 0.1}, 12, 9)}}, "from 12 to 10"),
        ({"blocks": {"0:2": [SolvedBlock(FlexibleConv2d(12, 10, rank=2), 0.1)]}}, "FlexibleLinear"),
        ({"blocks": MADE, "exclude": "2"}, "'2' is excluded"),
        ({"blocks": MADE, "include": ("0", "4")}, "'2' is not included"),
        ({"blocks": MADE, "rule": "uniform"}, "rule 'optimal'"),
        ({"blocks": MADE, "metric": "weights"}, "errors of outputs"),
        ({"blocks": MADE, "stats": None}, "moments=True"),
        ({"blocks": MADE, "init": "random", "rule": "uniform", "stats": None}, "blocks="),
        ({"blocks": MADE, "budget": rf.Budget(latency=0.5)}, "time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_plans_with_blocks_are_refused(arguments, words):
    with pytest.raises(PlanError, match=words):
        rf.plan(MODEL, **told(**{"budget": LOW, "stats": STATS, **arguments}))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: rf.compress(MODEL, example=DATA[0], budget=LOW, planning=rf.Planning(blocks="0:2")),
            PlanError,
            "loader",
        ),
        (
            lambda: rf.compress(MODEL, DATA, budget=LOW, planning=rf.Planning(blocks="0:2", rule="energy")),
            PlanError,
            "optimal",
        ),
        (
            lambda: rf.compress(MODEL, DATA, budget=rf.Budget(latency=0.5), planning=rf.Planning(blocks="0:2")),
            PlanError,
            "time",
        ),
        (lambda: rf.compress(MODEL, DATA, budget=LOW, planning=rf.Planning(blocks="0:7")), PlanError, "no module"),
        (lambda: flexible_candidates(CHAIN, ("0:2", "2:4"), DATA, ranks=(2,)), PlanError, "in common"),
        (lambda: flexible_candidates(CHAIN, ("0:2", "4:4"), DATA, ranks=(2,)), PlanError, "first:last"),
        (lambda: flexible_candidates(CONVS, "0:2", DATA, ranks=(2,)), LayerError, "stride"),
        (lambda: flexible_candidates(CHAIN, ("0:1", "2:4"), iter(DATA), ranks=(2,)), DataError, "iterator"),
        (lambda: flexible_candidates(CHAIN, "0:2", DATA, ranks=()), rf.RankfoldError, "rank"),
        (lambda: flexible_candidates(CHAIN, "0:2", DATA, ranks=(0,)), rf.RankfoldError, "rank"),
        (lambda: flexible_candidates(CHAIN, "0:2", [], ranks=(2,)), DataError, "no batch"),
        (
            lambda: rf.apply(MODEL, rf.Plan({"0:2": rf.Choice("flexible", 2)}), init="random", blocks=MADE),
            PlanError,
            "blocks=",
        ),
    ],
    ids=range(12),
)
def test_bad_calls_with_blocks_are_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
