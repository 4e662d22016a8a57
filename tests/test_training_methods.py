"""Does every training method end in low rank, by its own rule, in one interface, and go on after an interruption?"""

import json
import math

import pytest
import torch
from cases_svd_training import accuracy, convnet, images, mlp, train, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rankfold as rf
from rankfold.errors import LayerError, RankfoldError, StoreError
from rankfold.train import (
    DLRT,
    LC,
    METHODS,
    TRP,
    Cuttlefish,
    NuclearNorm,
    Pufferfish,
    Recipe,
    SVDTraining,
    fit,
    svd_form,
    training_method,
)

OPTIONS = {
    "svd": {"sparsity": 0.05},
    "trp": {"every": 5, "energy": 0.95},
    "nuclear": {"every": 5, "strength": 3.0, "lr": 1e-2},
    "pufferfish": {"warmup": 2, "first": 0, "last": 0},
    "cuttlefish": {"earliest": 2, "window": 1},
    "dlrt": {"tolerance": 0.15},
    "lc": {"every": 5, "strength": 0.5, "mu": 0.1},
}
methods = pytest.mark.parametrize("name", METHODS)


def method(name, model=None, **changes):
    return training_method(name, mlp() if model is None else model, **{**OPTIONS[name], **changes})


def adam(run, lr=1e-2):
    return torch.optim.Adam(run.model.parameters(), lr=lr)


def rank(values, share=1e-4):
    return int((values > share * values[0]).sum())


@methods
def test_every_method_trains_and_ends_in_plain_low_rank_layers(name):
    run = method(name)
    losses = train(run, adam(run), 60)
    run.epoch()
    run.epoch()
    assert losses[-1] < 0.5 * losses[0]
    small, plan = run.prune(**({"energy": 0.97} if name == "svd" else {}))
    assert {choice.method for choice in plan.layers.values()} <= {"svd", "dense"}
    assert any(choice.method == "svd" for choice in plan.layers.values()) or name == "cuttlefish"
    assert sum(p.numel() for p in small.parameters()) == plan.params <= plan.dense.params
    smaller, by_budget = run.prune(budget=rf.Budget(params=0.5))
    assert by_budget.params <= 0.5 * by_budget.dense.params
    assert torch.isfinite(smaller(vectors()[0])).all()


@methods
@pytest.mark.parametrize("split", ["spatial", "channel"])
def test_every_method_works_on_convolutions_of_either_split(name, split):
    run = method(name, convnet(), split=split)
    train(run, adam(run), 12, images())
    run.epoch()
    spectrum = run.spectrum()
    assert list(spectrum) == ["0", "3", "8"]
    for values in spectrum.values():
        assert values.dtype == torch.float64
        assert bool((values.diff() <= 1e-9).all())
    small, plan = run.prune(budget=rf.Budget(macs=0.5), example=images()[0])
    assert rf.measure(small, example=images()[0]).macs == plan.macs
    assert {c.options.get("split", split) for c in plan.layers.values() if c.method == "svd"} <= {split, "channel"}


@methods
def test_a_resumed_run_is_the_same_run(name):
    """Half a run, everything that a checkpoint holds through JSON and tensors, and the other half."""
    runs = [method(name), method(name)]
    optimizers = [adam(run) for run in runs]
    for run, optimizer in zip(runs, optimizers, strict=True):
        train(run, optimizer, 7)  # inside a period of every method
        run.epoch()
    once, _ = runs
    again = method(name)
    again.model.load_state_dict(once.model.state_dict())
    optimizer = adam(again)
    optimizer.load_state_dict(optimizers[0].state_dict())
    state = once.state_dict()
    plain = json.loads(json.dumps({key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}))
    again.load_state_dict({**state, **plain})
    train(runs[1], optimizers[1], 9)
    train(again, optimizer, 9)
    for one in (runs[1], again):
        one.epoch()
    assert (again.steps, again.epochs, again.finished) == (16, 2, runs[1].finished)
    torch.testing.assert_close(dict(again.model.state_dict()), dict(runs[1].model.state_dict()), rtol=0, atol=0)
    arguments = {"energy": 0.9} if name == "svd" else {}
    assert again.prune(**arguments)[1] == runs[1].prune(**arguments)[1]


@methods
def test_a_state_of_something_else_is_refused(name):
    run = method(name)
    other = "trp" if name != "trp" else "lc"
    with pytest.raises(StoreError, match="is the state of"):
        run.load_state_dict(method(other).state_dict())
    with pytest.raises(StoreError, match="incomplete or of other layers"):
        run.load_state_dict({**run.state_dict(), "surprise": 1})


@methods
def test_same_seed_same_run(name):
    states = []
    for _ in range(2):
        run = method(name)
        train(run, adam(run), 11)
        states.append(dict(run.model.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


# each method by its own rule


def test_trp_cuts_every_few_steps_to_the_energy_it_promises():
    model = mlp()
    run = TRP(model, every=3, energy=0.8, nuclear=0)
    optimizer = adam(run)
    train(run, optimizer, 2)
    assert rank(run.spectrum()["2"]) == 24
    before = run.spectrum()["2"]
    run.step()
    after = run.spectrum()["2"]
    kept = rf.ranks.energy(before, 0.8)
    assert rank(after) == kept < 24
    torch.testing.assert_close(after[:kept], before[:kept], rtol=1e-4, atol=1e-5)
    train(run, optimizer, 1)
    assert rank(run.spectrum()["2"]) > kept  # it grows again in between


def test_trp_adds_the_subgradient_of_the_nuclear_norm():
    run = TRP(mlp(), every=1, energy=0.9, nuclear=0.5)
    assert run.terms() == {}
    run.step()
    weight = run.layers["2"].weight
    (gradient,) = torch.autograd.grad(run.penalty(), weight)
    u, s, vh = torch.linalg.svd(weight.detach())
    kept = rank(s)
    torch.testing.assert_close(gradient, 0.5 * u[:, :kept] @ vh[:kept], atol=1e-4, rtol=1e-3)
    norms = sum(torch.linalg.svdvals(layer.weight.detach()).sum() for layer in run.layers.values())
    assert float(run.penalty().detach()) == pytest.approx(0.5 * float(norms), rel=1e-4)


def test_the_proximal_step_minimises_its_objective():
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    run = NuclearNorm(model, strength=0.3, lr=1.0, every=1)
    start = model[0].weight.detach().double()
    run.step()

    def objective(x):
        return float(0.5 * (x - start).square().sum() + 0.3 * torch.linalg.svdvals(x).sum())

    found = model[0].weight.detach().double()
    least = objective(found)
    assert all(objective(found + 1e-2 * torch.randn(5, 6, dtype=torch.float64)) > least for _ in range(50))
    with pytest.raises(RankfoldError, match="would set all of layer '0' to zero"):
        NuclearNorm(model, strength=100.0, lr=1.0, every=1).step()


def test_the_proximal_step_reads_the_rate_of_the_optimiser():
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = NuclearNorm(model, strength=0.5, lr=optimizer, every=2)
    before = run.spectrum()["0"]
    run.step()
    torch.testing.assert_close(run.spectrum()["0"], before)
    optimizer.param_groups[0]["lr"] = 0.2
    run.step()
    torch.testing.assert_close(run.spectrum()["0"], (before - 2 * 0.2 * 0.5).clamp_min(0), atol=1e-6, rtol=0)


def test_pufferfish_switches_after_its_warm_up_at_a_share_of_full_rank():
    run = Pufferfish(mlp(), warmup=2, share=0.25)
    assert [run.finished, run.epoch(), run.finished, run.epoch(), run.finished] == [False, None, False, None, True]
    small, plan = run.prune()
    assert {name: choice.rank for name, choice in plan.layers.items()} == {"0": None, "2": 6, "4": None}
    assert plan.layers["0"].reason == "not trained for low rank"
    torch.testing.assert_close(small[2].squared_norm().sqrt(), small[2].weight.norm())
    with pytest.raises(LayerError, match="none is left"):
        Pufferfish(mlp(), first=2, last=1)


def test_cuttlefish_waits_for_flat_stable_ranks_and_scales_them():
    model = nn.Sequential(nn.Linear(16, 16))
    run = Cuttlefish(model, earliest=2, window=2, smoothing=1, tolerance=0.1)
    full = run.stable_ranks["0"][0]
    u, s, vh = torch.linalg.svd(model[0].weight.detach())
    for decay in (2.0, 8.0, 8.0, 8.0):
        assert not run.finished
        with torch.no_grad():
            model[0].weight.copy_(u @ torch.diag(s[0] * torch.exp(-decay * torch.arange(16) / 16)) @ vh)
        run.epoch()
    assert run.finished
    stable = float((torch.exp(-8.0 * torch.arange(16) / 16).double() ** 2).sum())
    assert run.stable_ranks["0"][-1] == pytest.approx(stable, rel=1e-4)
    assert run.prune()[1].layers["0"].rank == math.ceil(stable * 16 / full)


def test_cuttlefish_keeps_what_has_not_changed():
    run = Cuttlefish(mlp())
    run.epoch()
    assert run._own_ranks() == {"0": 12, "2": 24, "4": 3}


def test_dlrt_is_the_integrator_of_the_paper():
    """One pair of gradient steps against K, L and S computed from the gradients of the dense loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias=False))
    run = DLRT(model, tolerance=0.5)
    rate, x, y = 0.05, torch.randn(20, 10), torch.randn(20, 8)

    def gradient(weight):
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad((F.linear(x, weight) - y).square().mean(), weight)[0]

    u, s, vh = torch.linalg.svd(model[0].weight.detach())
    r = rank(s)
    assert r < 8
    u, core, v = u[:, :r], torch.diag(s[:r]), vh[:r].T
    start = u @ core @ v.T
    k, low = u @ core - rate * gradient(start) @ v, v @ core.T - rate * gradient(start).T @ u
    rows, columns = torch.linalg.qr(torch.cat([k, u], 1)).Q, torch.linalg.qr(torch.cat([low, v], 1)).Q
    augmented = rows.T @ start @ columns
    moved = augmented - rate * rows.T @ gradient(rows @ augmented @ columns.T) @ columns
    p, values, qh = torch.linalg.svd(moved)
    kept = rf.ranks.energy(values, 1 - 0.5**2)
    expected = rows @ p[:, :kept] @ torch.diag(values[:kept]) @ qh[:kept] @ columns.T
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        run.step()
    torch.testing.assert_close(model[0].weight.detach(), expected, atol=1e-5, rtol=1e-4)
    assert rank(run.spectrum()["0"]) == kept


def test_the_rank_of_dlrt_grows_where_the_task_asks_for_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.randn(12), torch.randn(12)))
    run = DLRT(model, tolerance=0.05)
    assert rank(run.spectrum()["0"]) == 1
    target = torch.randn(12, 5) @ torch.randn(5, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.randn(200, 12)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        run.step()
    assert len(run.spectrum()["0"]) == 5
    torch.testing.assert_close(model[0].weight.detach(), target, atol=0.6, rtol=0.1)


def test_the_compression_step_of_lc_is_exact():
    run = LC(mlp(), strength=2.0, mu=0.5, every=1)
    total = sum(layer.weight.numel() for layer in run.layers.values())
    for name, layer in run.layers.items():
        rows, columns = layer.weight.shape
        values = torch.linalg.svdvals(layer.weight.detach().double())
        costs = [
            2.0 * r * (rows + columns) / total + 0.25 * float(values[r:].square().sum())
            for r in range(1, len(values) + 1)
        ]
        assert run._own_ranks()[name] == 1 + costs.index(min(costs))


def test_lc_pulls_the_weights_to_low_rank():
    run = LC(mlp(), strength=1.0, mu=0.1, growth=1.3, every=10)
    optimizer = adam(run)
    train(run, optimizer, 200)
    for name, layer in run.layers.items():
        values = torch.linalg.svdvals(layer.weight.detach())
        kept = run._own_ranks()[name]
        assert float(values[kept:].square().sum() / values.square().sum()) < 0.01
    assert accuracy(run.model) > 0.95
    small, _ = run.prune()
    assert accuracy(small) > 0.9


def test_lc_counts_macs_where_there_is_an_example():
    by_params, by_macs = LC(convnet(), every=1), LC(convnet(), every=1, example=images()[0])
    share = {run: run._costs["8"] / run._costs["0"] for run in (by_params, by_macs)}
    assert share[by_macs] < share[by_params] / 20  # the classifier is called once, the convolution at 64 places


# in the one loop of the library


def loader():
    return DataLoader(TensorDataset(*vectors()), batch_size=16, shuffle=True)


@methods
def test_fit_applies_a_method_and_resumes(name, tmp_path):
    recipe = {"decay": 0.0, "progress": False}
    whole, halves = method(name), method(name)
    rows = []
    history = fit(whole.model, loader(), epochs=4, recipe=Recipe(method=whole, watch=rows.append, **recipe))
    path = tmp_path / "run.safetensors"
    assert list(history.epochs) == rows
    stop = {"left": 2}

    def interrupt(row):
        stop["left"] -= 1
        if not stop["left"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(halves.model, loader(), epochs=4, recipe=Recipe(method=halves, checkpoint=path, watch=interrupt, **recipe))
    again = method(name)
    fit(again.model, loader(), epochs=4, recipe=Recipe(method=again, checkpoint=path, **recipe))
    assert (again.steps, again.epochs) == (whole.steps, whole.epochs)
    torch.testing.assert_close(dict(again.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0)


def test_fit_shows_the_penalty_and_stops_when_a_method_is_finished():
    run = method("svd")
    history = fit(run.model, loader(), epochs=2, recipe=Recipe(method=run, decay=0.0))
    assert all(row.penalty > 0 and row.loss == pytest.approx(row.task + row.penalty) for row in history.epochs)
    short = method("pufferfish")
    assert len(fit(short.model, loader(), epochs=5, recipe=Recipe(method=short)).epochs) == 2
    with pytest.raises(RankfoldError, match="of another model"):
        fit(mlp(), loader(), recipe=Recipe(method=run))


def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_checkpoint(tmp_path):
    run, path = method("svd"), tmp_path / "run.safetensors"

    class Poisoned:
        reads = 0

        def __iter__(self):
            self.reads += 1
            for k, (x, y) in enumerate(DataLoader(TensorDataset(*vectors()), batch_size=16)):
                yield (x * math.nan if self.reads == 2 and k == 2 else x), y

        def __len__(self):
            return 4

    recipe = Recipe(method=run, checkpoint=path, batchnorm=0)
    with pytest.raises(RankfoldError, match=r"the loss \(nan\) is NaN or Inf in epoch 2, step 3"):
        fit(run.model, Poisoned(), epochs=3, recipe=recipe)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    kept = {name: p.clone() for name, p in run.model.state_dict().items()}
    again = method("svd")
    again.model.load_state_dict(kept)
    goes_on = fit(again.model, list(loader()), epochs=3, recipe=Recipe(method=again, checkpoint=path, batchnorm=0))
    assert [row.epoch for row in goes_on.epochs] == [1, 2, 3]


def test_the_total_names_the_step_of_a_nan():
    run = SVDTraining(svd_form(mlp())[0])
    assert float(run.total(torch.ones(())).detach()) == pytest.approx(1 + float(run.penalty().detach()))
    run.step()
    with pytest.raises(RankfoldError, match="the loss is NaN or Inf in step 2"):
        run.total(torch.tensor(math.nan))
    with torch.no_grad():
        run.layers["0"].scale[0] = math.inf
    with pytest.raises(RankfoldError, match="the penalty is NaN or Inf in step 2"):
        run.total(torch.ones(()))


# bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("admm", {}, "method must be .*'lc', got 'admm'"),
        ("svd", {"rank": 3}, "method 'svd'"),
        ("trp", {"every": 0}, "every must be a whole number >= 1, got 0"),
        ("trp", {"energy": 1.5}, "energy must be a number with 0 < x <= 1"),
        ("nuclear", {"strength": -1.0}, "strength must be a number >= 0, got -1.0"),
        ("nuclear", {"lr": "fast"}, "lr must be a number >= 0, got 'fast'"),
        ("pufferfish", {"warmup": 0}, "warmup must be a whole number >= 1"),
        ("pufferfish", {"share": 0}, "share must be a number with 0 < x <= 1"),
        ("pufferfish", {"first": -1}, "first must be a whole number >= 0, got -1"),
        ("cuttlefish", {"window": 0}, "window must be a whole number >= 1"),
        ("dlrt", {"tolerance": 1.0}, "tolerance must be a number with 0 <= x < 1"),
        ("lc", {"mu": 0.0}, "mu must be a number > 0"),
        ("lc", {"growth": 0.9}, "growth must be a number >= 1, got 0.9"),
        ("lc", {"split": "rows"}, "split must be 'channel' or 'spatial', got 'rows'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(RankfoldError, match=message):
        training_method(name, mlp(), **options)


@methods
def test_a_model_with_nothing_to_train(name):
    with pytest.raises(LayerError, match="no Linear or convolution"):
        method(name, nn.Sequential(nn.ReLU()))
