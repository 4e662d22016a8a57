"""Does SVD training do what it says: an equal model, penalties by their formulas, ranks that are found and kept?"""

import math

import pytest
import torch
from cases_svd_training import accuracy, convnet, images, mlp, train, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from rankfold.errors import BudgetError, LayerError, PlanError, RankfoldError
from rankfold.layers import LowRankLinear, SVDConv2d, SVDLinear
from rankfold.train import KINDS, SVDTraining, restarted, svd_form
from rankfold.train.lowrank._penalties import orthogonality, sparsity

SPLITS = ("spatial", "channel")


def orthonormal(rows, columns, seed=0):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(matrix).Q


# the form


@pytest.mark.parametrize("split", SPLITS)
def test_the_form_computes_what_the_model_computes(split):
    model, (x, _) = convnet().eval(), images()
    form, plan = svd_form(model, split)
    torch.testing.assert_close(form(x), model(x), rtol=1e-5, atol=1e-5)
    assert [type(form[k]) for k in (0, 3, 8)] == [SVDConv2d, SVDConv2d, SVDLinear]
    assert form[3].options == {"split": split}
    assert {name: choice.method for name, choice in plan.layers.items()} == dict.fromkeys("038", "svd_form")
    assert plan.layers["3"].params == sum(p.numel() for p in form[3].parameters())
    assert type(model[3]) is nn.Conv2d


@pytest.mark.parametrize("split", SPLITS)
def test_the_form_saves_and_loads_by_its_plan(split, tmp_path):
    form, plan = svd_form(convnet(), split)
    assert rf.Plan.from_json(plan.to_json()) == plan
    rf.save(form, plan, tmp_path / "form.safetensors")
    loaded = rf.load(tmp_path / "form.safetensors", convnet())
    torch.testing.assert_close(dict(loaded.state_dict()), dict(form.state_dict()), rtol=0, atol=0)


def test_a_random_form_starts_from_orthonormal_factors_and_the_norm_of_a_fresh_layer():
    model, (x, _) = convnet(), images()
    form, _ = svd_form(model, init="random", seed=3)
    assert not torch.allclose(form.eval()(x), model.eval()(x), atol=1e-2)
    left, values, right = form[3].triplets()
    torch.testing.assert_close(left[0].T @ left[0], torch.eye(left.shape[2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(right[0] @ right[0].T, torch.eye(left.shape[2]), atol=1e-5, rtol=0)
    assert float(values.detach().square().sum()) == pytest.approx(16 / 3, rel=1e-4)
    again, _ = svd_form(model, init="random", seed=3)
    torch.testing.assert_close(dict(again.state_dict()), dict(form.state_dict()), rtol=0, atol=0)


def test_layers_are_chosen_by_name_and_others_have_their_reason():
    net = nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 3), nn.Linear(5, 5))
    form, plan = svd_form(net, exclude="3")
    assert [choice.method for choice in plan.layers.values()] == ["dense", "dense", "svd_form", "dense"]
    assert [plan.layers[name].reason for name in "013"] == [
        "Embedding has no SVD form",
        "its full rank is 1",
        "excluded",
    ]
    assert form[2].options == {"split": "channel"}
    assert svd_form(net, include="3")[1].layers["2"].reason == "not included"


def test_a_component_of_no_weight_can_still_grow():
    dense = nn.Linear(6, 6)
    with torch.no_grad():
        dense.weight[3:] = 0
    layer = SVDLinear.from_dense(dense, rank=6)
    torch.testing.assert_close(layer.down.weight @ layer.down.weight.T, torch.eye(6), atol=1e-6, rtol=0)
    layer(torch.randn(4, 6)).square().sum().backward()
    assert bool((layer.scale.grad != 0)[:3].all())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_values_are_zero(kind):
    form, _ = svd_form(mlp())
    with torch.no_grad():
        form[0].scale.zero_()
        form[2].scale[:5] = 0
    run = SVDTraining(form, kind=kind, sparsity=1.0)
    (form(vectors()[0]).square().sum() + run.penalty()).backward()
    for name, parameter in form.named_parameters():
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert bool(form[0].scale.grad.any())  # and a value that is 0 can leave it again


@pytest.mark.parametrize(
    ("dense", "options", "sizes"),
    [
        (nn.Linear(12, 10, dtype=torch.float64), {}, [(2, 12), (400, 12)]),
        (
            nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, padding_mode="reflect", dtype=torch.float64),
            {"split": "spatial"},
            [(1, 6, 4, 4), (8, 6, 12, 12)],
        ),
    ],
)
def test_the_cheaper_way_is_taken_costs_what_is_said_and_computes_the_same(dense, options, sizes):
    cls = rf.layers.layer_class(dense, "svd_form")
    rank = cls.full_rank(dense, **options)
    layer = cls.like(dense, rank=rank, **options)
    plain = layer.truncated(rank)
    ways = []
    for size in sizes:
        x = torch.randn(size, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = layer(x)
        torch.testing.assert_close(output, plain(x).detach())
        call = rf.layers.Call(size, tuple(output.shape))
        macs = layer.cost(dense, [call], rank=rank, **options).macs
        assert macs == counter.get_total_flops() // 2
        stages = type(plain).cost(dense, [call], rank=rank, **options).macs
        ways.append("stages" if macs == stages else "rebuilt")
        assert macs <= stages
    assert ways == ["stages", "rebuilt"]


# the penalties


def test_orthogonality_is_its_formula_and_zero_for_orthonormal_factors():
    factors = [
        torch.randn(2, 7, 4, dtype=torch.float64),
        torch.randn(1, 7, 4, dtype=torch.float64),
        torch.randn(1, 5, 5),
    ]
    expected = sum(
        (u.double().mT @ u.double() - torch.eye(u.shape[2])).square().sum(dim=(1, 2)).mean() / u.shape[2] ** 2
        for u in factors
    )
    assert float(orthogonality(factors)) == pytest.approx(float(expected), rel=1e-5)
    assert float(orthogonality([orthonormal(9, 4)[None], orthonormal(5, 5)[None]])) < 1e-28
    assert float(orthogonality([2 * orthonormal(9, 4)[None]])) == pytest.approx(9 / 4)


def test_the_gradient_of_orthogonality_is_that_of_its_formula():
    factors = [torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(lambda *given: orthogonality(given), factors)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("l1", lambda s: s.abs().sum()),
        ("hoyer", lambda s: s.abs().sum() / s.norm() - 1),
        ("hoyer_square", lambda s: s.abs().sum() ** 2 / s.norm() ** 2 - 1),
    ],
)
def test_sparsity_is_its_formula(kind, formula):
    vectors_ = [torch.randn(5, dtype=torch.float64) for _ in range(3)] + [torch.randn(8, dtype=torch.float64)]
    expected = sum(formula(s) for s in vectors_)
    torch.testing.assert_close(sparsity([s[None] for s in vectors_], kind), expected)
    groups = torch.stack(vectors_[:3])
    torch.testing.assert_close(sparsity([groups], kind), sum(formula(s) for s in groups) / 3)
    assert float(sparsity([torch.zeros(1, 4)], kind)) == 0


@pytest.mark.parametrize("kind", ["hoyer", "hoyer_square"])
def test_hoyer_is_zero_for_one_value_and_the_same_at_every_scale(kind):
    one = torch.tensor([[0.0, -3.0, 0.0, 0.0]])
    assert float(sparsity([one], kind)) == 0
    equal = torch.full((1, 9), 0.2)
    assert float(sparsity([equal], kind)) == pytest.approx(2.0 if kind == "hoyer" else 8.0, rel=1e-5)
    values = torch.randn(1, 9).requires_grad_()
    torch.testing.assert_close(sparsity([1e-3 * values], kind), sparsity([values], kind), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(sparsity([values], kind), values)
    assert float((gradient * values).sum().detach()) == pytest.approx(0, abs=1e-5)  # nothing to gain by a smaller scale


def test_batchnorm_lets_l1_cheat_and_not_hoyer():
    """Behind BatchNorm all values may shrink together for nothing: L1 falls, every Hoyer measure stays."""
    model, (x, _) = convnet().train(), images()
    form, _ = svd_form(model)
    runs = {kind: SVDTraining(form, orthogonality=0, sparsity=1.0, kind=kind) for kind in KINDS}

    def penalty(kind):
        return float(runs[kind].penalty().detach())

    before, output = {kind: penalty(kind) for kind in KINDS}, form(x).detach()
    with torch.no_grad():
        form[0].scale *= 0.5
        form[3].scale *= 0.5
    torch.testing.assert_close(form(x), output, atol=2e-3, rtol=2e-3)
    assert penalty("l1") < 0.8 * before["l1"]
    assert penalty("hoyer") == pytest.approx(before["hoyer"], rel=1e-5)
    assert penalty("hoyer_square") == pytest.approx(before["hoyer_square"], rel=1e-5)


def test_the_penalty_of_a_fresh_form_is_its_sparsity_alone():
    form, _ = svd_form(convnet())
    terms = SVDTraining(form, orthogonality=1.0, sparsity=0.5).terms()
    assert float(terms["orthogonality"].detach()) < 1e-10
    scales = [form[k].scale.detach() for k in (0, 3, 8)]
    expected = sum(0.5 * float(scale.sum() / scale.norm() - 1) for scale in scales)
    assert float(terms["sparsity"].detach()) == pytest.approx(expected, rel=1e-5)
    assert list(SVDTraining(form, orthogonality=0, sparsity=0).terms()) == []
    assert float(SVDTraining(form, orthogonality=0, sparsity=0).penalty()) == 0


def test_the_schedule_follows_the_steps():
    form, _ = svd_form(mlp())
    run = SVDTraining(form, orthogonality=0, sparsity=1.0, schedule=lambda step: min(1.0, step / 4))
    assert run.terms() == {}
    run.step()
    first = float(run.penalty().detach())
    run.step()
    assert float(run.penalty().detach()) == pytest.approx(2 * first)


def test_backward_adds_the_gradient_of_the_penalty():
    form, _ = svd_form(mlp())
    run = SVDTraining(form)
    with torch.no_grad():
        form[0].down.weight.add_(0.1)
    x, y = vectors()
    (F.cross_entropy(form(x), y) + run.penalty()).backward()
    together = {name: p.grad.clone() for name, p in form.named_parameters()}
    form.zero_grad()
    F.cross_entropy(form(x), y).backward()
    run.backward()
    for name, parameter in form.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name])


# training


def test_training_finds_a_lower_rank_and_keeps_the_factors_orthonormal():
    form, _ = svd_form(mlp())
    run = SVDTraining(form, orthogonality=1.0, sparsity=0.05)
    before = run.spectrum()["2"]
    train(run, torch.optim.Adam(form.parameters(), lr=1e-2), 300)
    after = run.spectrum()["2"]
    assert rf.ranks.energy(after, 0.99) <= rf.ranks.energy(before, 0.99) - 8
    assert float(run.terms()["orthogonality"].detach()) < 1e-2
    assert accuracy(form) > 0.95
    small, plan = run.prune(energy=0.99)
    assert accuracy(small) > 0.95
    assert plan.params < plan.dense.params


def test_without_orthogonality_the_penalty_is_escaped():
    """The values shrink and the factors grow: the paper's own cut by |s| then loses what a cut of the weight keeps."""
    shares = {}
    for weight in (0.0, 10.0):
        form, _ = svd_form(mlp())
        run = SVDTraining(form, orthogonality=weight, sparsity=0.1, kind="l1")
        train(run, torch.optim.Adam(form.parameters(), lr=1e-2), 150)
        shares[weight] = float(form[2].scale.detach().norm() / form[2].weight.detach().norm())
    assert shares[0.0] < 0.15
    assert shares[10.0] > 0.5  # 1 for orthonormal factors


def test_retraction_keeps_the_factors_orthonormal_to_rounding():
    form, _ = svd_form(convnet())
    run = SVDTraining(form, orthogonality="retraction", sparsity=0.01)
    optimizer = torch.optim.Adam(form.parameters(), lr=1e-2)
    losses = train(run, optimizer, 12, images())
    assert "orthogonality" not in run.terms()
    for layer in (form[0], form[3], form[8]):
        left, _, right = layer.triplets()
        assert float(orthogonality([left, right.mT]).detach()) < 1e-10
    assert losses[-1] < losses[0]
    torch.testing.assert_close(  # then |s| are the singular values themselves
        torch.linalg.svdvals(form[8].weight.detach()).double(), run.spectrum()["8"], atol=1e-5, rtol=1e-4
    )


# pruning


def trained(split="spatial"):
    form, _ = svd_form(convnet(), split)
    run = SVDTraining(form, sparsity=0.05)
    train(run, torch.optim.Adam(form.parameters(), lr=1e-2), 15, images())
    form.eval()
    return run


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("energy", [0.6, 0.9, 0.99])
def test_pruning_keeps_the_promised_energy(split, energy):
    run = trained(split)
    small, plan = run.prune(energy=energy)
    for name, choice in plan.layers.items():
        before = run.model.get_submodule(name).weight.detach().double()
        after = small.get_submodule(name).weight.detach().double()
        lost = float((before - after).square().sum() / before.square().sum())
        assert lost <= 1 - energy + 1e-6, name
        if choice.method == "svd":
            assert lost == pytest.approx(choice.error**2, abs=1e-6)
            if choice.rank > 1:  # and no more than promised
                values = torch.linalg.svdvals(rf.layers.unfolded(before, **choice.options)[0])
                assert float(values[: choice.rank - 1].square().sum() / values.square().sum()) < energy


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("macs", [0.7, 0.5, 0.3])
def test_pruning_meets_a_budget(split, macs):
    run, (x, _) = trained(split), images()
    small, plan = run.prune(budget=rf.Budget(macs=macs), example=x)
    dense = rf.measure(convnet(), example=x).macs
    assert rf.measure(small, example=x).macs == plan.macs <= macs * dense
    used = [choice for choice in plan.layers.values() if choice.method == "svd"]
    assert used
    assert all(choice.options.get("split", split) in (split, "channel") for choice in used)
    assert {type(module) for module in small.modules()}.isdisjoint({SVDConv2d, SVDLinear})


def test_pruning_leaves_the_model_in_training_alone():
    run = trained()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    small, _ = run.prune(energy=0.5)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    torch.testing.assert_close(dict(run.model.state_dict()), before, rtol=0, atol=0)


def test_a_cut_by_values_is_the_cut_of_the_weight_where_factors_are_orthonormal():
    form, _ = svd_form(mlp())
    run = SVDTraining(form)
    small, plan = run.prune(budget=rf.Budget(params=0.5))
    by_values = run.prune_by_values(plan)
    x = vectors()[0]
    torch.testing.assert_close(by_values(x), small(x), atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the same function with values that say nothing: only a cut of the weight sees through it
        form[2].scale[:12] *= 0.01
        form[2].down.weight[:12] *= 100
    torch.testing.assert_close(run.prune(budget=rf.Budget(params=0.5))[0](x), small(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(run.prune_by_values(plan)(x), small(x), atol=1e-2)


def test_a_layer_at_full_energy_becomes_dense_again():
    run = SVDTraining(svd_form(mlp())[0])
    small, plan = run.prune(energy=1.0)
    assert {choice.method for choice in plan.layers.values()} == {"dense"}
    assert "saves nothing" in plan.layers["2"].reason
    x = vectors()[0]
    torch.testing.assert_close(small(x), mlp()(x), atol=1e-5, rtol=1e-5)


def test_a_pruned_model_saves_and_loads(tmp_path):
    small, plan = trained().prune(energy=0.9)
    rf.save(small, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", convnet()).eval()
    x, _ = images()
    torch.testing.assert_close(loaded(x), small.eval()(x))


# the optimiser after pruning


def test_the_optimiser_restarts_warm():
    form, _ = svd_form(mlp())
    run = SVDTraining(form, sparsity=0.05)
    weights = [p for p in form.parameters() if p.ndim > 1]
    rest = [p for p in form.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1, "lr": 1e-2}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups)
    train(run, optimizer, 5)
    small, _ = run.prune(budget=rf.Budget(params=0.5))
    fresh, schedule = restarted(optimizer, form, small, warmup=4)
    assert type(fresh) is torch.optim.AdamW
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.1, 0.0]
    held = {id(p) for group in fresh.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    bias, before = small[4].bias, form[4].bias
    torch.testing.assert_close(fresh.state[bias]["exp_avg"], optimizer.state[before]["exp_avg"], rtol=0, atol=0)
    factor = next(layer for layer in small if isinstance(layer, LowRankLinear)).down.weight
    assert not fresh.state[factor]
    rates = []
    for _ in range(6):
        rates.append([round(group["lr"], 8) for group in fresh.param_groups])
        small(vectors()[0]).square().sum().backward()
        fresh.step()
        schedule.step()
    assert [rate for rate, _ in rates] == [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01]
    assert rates[-1][1] == 0.02
    assert math.isfinite(float(small(vectors()[0]).detach().sum()))


# bad input


def test_a_model_without_a_layer_to_train():
    with pytest.raises(LayerError, match="Sequential has no Linear or convolution"):
        svd_form(nn.Sequential(nn.ReLU()))
    with pytest.raises(LayerError, match="'0' Embedding has no SVD form"):
        svd_form(nn.Sequential(nn.Embedding(4, 4)))


def test_a_penalty_of_a_model_that_is_not_in_the_form():
    with pytest.raises(LayerError, match=r"no layer in SVD form: make one with rankfold\.train\.svd_form"):
        SVDTraining(mlp())


def test_a_budget_below_rank_one_everywhere():
    run = SVDTraining(svd_form(convnet())[0])
    with pytest.raises(BudgetError, match="closest reachable is macs=0"):
        run.prune(budget=rf.Budget(macs=0.001), example=images()[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "energy=0.999, or budget="),
        ({"energy": 0.9, "budget": rf.Budget(params=0.5)}, "not by both"),
        ({"energy": 0}, "energy must be a number with 0 < x <= 1"),
        ({"energy": 1.2}, "energy must be a number with 0 < x <= 1"),
        ({"budget": rf.Budget(macs=0.5)}, "needs example="),
    ],
)
def test_bad_pruning(arguments, message):
    with pytest.raises(RankfoldError, match=message):
        SVDTraining(svd_form(mlp())[0]).prune(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l2"}, "kind must be .*, got 'l2'"),
        ({"orthogonality": -1.0}, "orthogonality must be a number >= 0"),
        ({"orthogonality": "penalty"}, "must be a weight >= 0 or 'retraction'"),
        ({"sparsity": float("nan")}, "sparsity must be a number >= 0, got nan"),
        ({"schedule": "cosine"}, "schedule must be 'constant' or a function of the step, got 'cosine'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RankfoldError, match=message):
        SVDTraining(svd_form(mlp())[0], **options)


def test_bad_forms():
    with pytest.raises(RankfoldError, match="split must be .*, got 'rows'"):
        svd_form(mlp(), "rows")
    with pytest.raises(PlanError, match="matches no factorisable layer"):
        svd_form(mlp(), include="head")
    broken = mlp()
    with torch.no_grad():
        broken[2].weight[0, 0] = math.nan
    with pytest.raises(LayerError, match="'2'"):
        svd_form(broken)
