"""Is an architecture planned and converted without its weights, and does what comes of it train?"""

import copy
from dataclasses import replace

import pytest
import torch
from cases_models import convnet, mlp, told
from torch import nn

import rankfold as rf
from rankfold.errors import PlanError
from rankfold.layers import is_factorised


class Block(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.skip(x))


class Tokens(nn.Module):
    """An embedding, a hidden layer, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(500, 32, padding_idx=0)
        self.body, self.head = nn.Linear(32, 48), nn.Linear(48, 5)

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.embed(ids).mean(1))))


def resnet():
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(
        *stem, Block(16, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )


IMAGES, ROWS = torch.randn(2, 3, 12, 12), torch.randn(4, 48)
MODELS = {
    "resnet": (resnet, IMAGES, ("tucker", "svd")),
    "convnet": (convnet, IMAGES, ("cp", "svd")),
    "mlp": (lambda: mlp(48, 96, 64, 10), ROWS, ("tt",)),
    "tokens": (Tokens, torch.randint(1, 500, (4, 7)), ("tt", "svd")),
}
models = pytest.mark.parametrize("case", MODELS)


def filled(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


STATES = {
    "zeros": lambda model: filled(model, 0.0),
    "nan": lambda model: filled(model, float("nan")),
    "meta": lambda model: copy.deepcopy(model).to("meta"),
    "half": lambda model: model.to(torch.bfloat16),
}


def planned(case, **arguments):
    make, example, methods = MODELS[case]
    model = make()
    return rf.plan(
        model,
        **told(
            **{
                "stats": rf.measure(model, example=example),
                "budget": rf.Budget(params=0.5),
                "methods": methods,
                "rule": "uniform",
                "init": "random",
                **arguments,
            }
        ),
    )


@models
@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.6}], ids=str)
def test_predictions_are_exact_and_there_is_no_error(case, budget):
    make, example, _ = MODELS[case]
    budget = {"params": 0.4} if case == "tokens" else budget  # a look-up does no multiply-adds
    plan = planned(case, budget=rf.Budget(**budget))
    after = rf.measure(rf.apply(make(), plan, init="random"), example=example)
    assert (after.params, after.macs) == (plan.params, plan.macs)
    for quantity, share in budget.items():
        assert getattr(plan, quantity) <= share * plan.dense[quantity]
    changed = [choice for choice in plan.layers.values() if choice.method != "dense"]
    assert changed
    assert all(choice.error is None for choice in changed)
    assert plan.error is None
    assert rf.Plan.from_json(plan.to_json()) == plan


def without_bytes(plan):
    """The layers of a plan without their bytes, which are the dtype's."""
    rest = {name: [replace(one, bytes=None) for one in (c.amounts, c.dense)] for name, c in plan.layers.items()}
    return {name: replace(choice, amounts=rest[name][0], dense=rest[name][1]) for name, choice in plan.layers.items()}


@models
@pytest.mark.parametrize("state", STATES)
def test_the_weights_do_not_matter(case, state):
    make, _, methods = MODELS[case]
    found, plain = (
        rf.plan(
            model, budget=rf.Budget(params=0.4), methods=methods, planning=rf.Planning(rule="uniform", init="random")
        )
        for model in (STATES[state](make()), make())
    )
    assert without_bytes(found) == without_bytes(plain)
    assert any(choice.method != "dense" for choice in found.layers.values())


@models
def test_a_model_on_meta_is_measured_planned_and_filled(case):
    make, example, methods = MODELS[case]
    with torch.device("meta"):
        hollow = make()
    stats = rf.measure(hollow, example=example)
    assert stats == rf.measure(make(), example=example)
    assert stats == rf.measure(hollow, example=example.to("meta"))
    plan = rf.plan(
        hollow, stats=stats, budget=rf.Budget(params=0.5), methods=methods, planning=rf.Planning(rule="uniform")
    )
    assert plan.layers == planned(case).layers
    small = rf.apply(hollow, plan, init="random")
    assert all(parameter.is_meta for parameter in small.parameters())
    small.to_empty(device="cpu")
    filled(small, float("nan"))
    small.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert bool(torch.isfinite(small(example)).all())
    for layer in filter(is_factorised, small.modules()):
        rows, fan_in = layer.weight.shape[0], layer.weight[0].numel()
        expected = (rows - 1) * fan_in if isinstance(layer, layer_of("tokens")) else rows / 3
        assert float(layer.squared_norm().detach()) == pytest.approx(expected, rel=1e-3)


def layer_of(case):
    """The kinds of layers of a case that stand in for a table."""
    return (rf.layers.TTEmbedding, rf.layers.LowRankEmbedding) if case == "tokens" else ()


@models
def test_what_comes_of_it_trains(case):
    make, example, _ = MODELS[case]
    torch.manual_seed(0)
    small = rf.apply(make(), planned(case), init="random", seed=1)
    target = torch.arange(len(example)) % 5
    optimizer = torch.optim.AdamW(rf.train.parameter_groups(small, lr=3e-3, weight_decay=0.01))
    losses = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(small(example), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_compress_does_all_of_it():
    model = filled(mlp(48, 96, 64, 10), float("nan"))
    small, plan = rf.compress(
        model, example=ROWS, budget=rf.Budget(params=0.4), planning=rf.Planning(rule="uniform", init="random")
    )
    assert sum(p.numel() for p in small.parameters()) == plan.params
    again = rf.apply(model, plan, init="random")
    assert all(map(torch.equal, small[1].parameters(), again[1].parameters()))
    assert bool(torch.isfinite(small[1].weight).all())


# --- which choice


def test_the_first_method_with_a_rank_is_taken():
    wanted = {name: choice.method for name, choice in planned("resnet").layers.items() if choice.method != "dense"}
    assert {wanted["3.conv1"], wanted["4.conv2"]} == {"tucker"}
    assert wanted["4.skip"] == "svd"  # a matrix, which Tucker leaves to the SVD
    other = planned("resnet", methods=("svd", "tucker")).layers
    assert {choice.method for choice in other.values()} <= {"svd", "dense"}


def test_of_one_method_the_largest_share_of_the_full_rank_is_taken():
    model, budget = mlp(64, 64), rf.Budget(params=0.5)
    (choice,) = rf.plan(
        model, budget=budget, methods="svd", planning=rf.Planning(rule="uniform", init="random")
    ).layers.values()
    assert choice.rank == max(
        rank
        for rank in rf.layers.LowRankLinear.rank_grid(model[0])
        if rf.layers.LowRankLinear.cost(model[0], [], rank=rank).params <= choice.dense.params / 2
    )
    spatial = rf.plan(
        nn.Sequential(nn.Conv2d(32, 32, 3)),
        budget=budget,
        methods="svd",
        planning=rf.Planning(rule="uniform", init="random"),
    ).layers["0"]
    shares = {}
    for split in ("channel", "spatial"):
        conv, kind = nn.Conv2d(32, 32, 3), rf.layers.LowRankConv2d
        full, grid = kind.full_rank(conv, split=split), kind.rank_grid(conv, split=split)
        limit = (32 * 32 * 9 + 32) / 2
        shares[split] = max(r / full for r in grid if kind.cost(conv, [], rank=r, split=split).params <= limit)
    assert spatial.options["split"] == max(shares, key=shares.get)


@pytest.mark.parametrize("rule", ["optimal", "energy", "evbmf"])
def test_a_rule_that_reads_weights_is_refused(rule):
    with pytest.raises(PlanError, match=f"rule '{rule}' reads the weights.*'uniform'"):
        planned("mlp", rule=rule)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(PlanError, match="init must be 'decompose' or 'random', got 'zeros'"):
        planned("mlp", init="zeros")


def test_a_function_chooses_without_errors():
    def smallest(candidates, limits):
        assert all(choice.error is None for choices in candidates.values() for choice in choices[1:])
        return {name: min(choices, key=lambda choice: choice.params) for name, choices in candidates.items()}

    plan = planned("mlp", rule=smallest, budget=None, methods="svd")
    assert {choice.rank for choice in plan.layers.values()} == {1}


def test_uniform_still_looks_at_weights_that_are_there():
    plan = planned("mlp", init="decompose", methods=("svd", "tt"))
    assert plan.error > 0
    with pytest.raises(rf.RankfoldError, match="NaN"):
        rf.plan(filled(mlp(8, 8), float("nan")), budget=rf.Budget(params=0.5), planning=rf.Planning(rule="uniform"))


@pytest.mark.parametrize("name", ["1", "head"])
def test_what_a_layer_is_still_counts(name):
    model = nn.ModuleDict({"1": nn.Linear(32, 32), "head": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
    if name == "head":
        model["head"].weight = model["1"].weight
    else:
        model["1"].register_forward_hook(lambda *_: None)
    plan = rf.plan(model, budget=rf.Budget(params=0.8), planning=rf.Planning(rule="uniform", init="random"))
    assert plan.layers[name].method == "dense"
    assert plan.layers[name].reason
    assert plan.layers["other"].method == "svd"


def test_a_model_on_meta_is_compressed_as_it_is_planned():
    with torch.device("meta"):
        hollow = mlp(64, 64, 64)
    planning = rf.Planning(rule="uniform", methods="svd")
    example = torch.ones(1, 64)
    small, plan = rf.compress(hollow, example=example, budget=rf.Budget(params=0.5), planning=planning)
    assert plan.planning.init == "random" and all(parameter.is_meta for parameter in small.parameters())
    assert plan == rf.plan(hollow, example=example, budget=rf.Budget(params=0.5), planning=planning)
    assert rf.compress(hollow, example=example, plan=plan)[1] == plan
