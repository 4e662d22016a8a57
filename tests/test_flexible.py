"""Does a flexible layer compute what it was found to be, and can it stand for a block of any network?"""

import copy

import pytest
import torch
from cases_flexible import block, sampled
from torch import nn
from torch.testing import assert_close

from rankfold import Budget, Choice, Plan, apply, load, measure, report, save
from rankfold.decompose import Basis, Shapes, coupled, values_of
from rankfold.errors import BudgetError, DataError, LayerError, PlanError, RankfoldError
from rankfold.exporters import export
from rankfold.layers import FlexibleActivation, FlexibleLinear
from rankfold.train import decouple, decouple_errors
from rankfold.train.flexible._block_data import read_block
from rankfold.train.flexible._block_fit import fitted_to_values
from rankfold.train.flexible._block_tensors import affordable, frame_of

BASES = [
    ("piecewise", 6, ""),
    ("piecewise", 1, "relu"),
    ("legendre", 4, ""),
    ("chebyshev", 5, "tanh"),
    ("spline", 7, "gelu"),
]
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def data_of(width=8, batches=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(32, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(batches)]


def shaken(module):
    """Return the module with every parameter moved off its initial value."""
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(k)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return module


# --- the layer ---


@pytest.mark.parametrize("options", BASES, ids=str)
def test_an_activation_is_the_sum_of_its_functions(options):
    activation = shaken(FlexibleActivation(3, *options, dtype=torch.float64))
    u = 2 * torch.randn(2, 25, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    empty = u.new_zeros(3, 0)
    parts = [activation.knots, activation.stretch, activation.shift]
    own = Shapes(*(empty if part is None else part for part in parts))
    wanted = (values_of(activation.basis, u, own) * activation.coefficients).sum(-1)
    assert_close(activation(u), wanted)


@pytest.mark.parametrize("options", BASES, ids=str)
def test_every_parameter_has_its_gradient(options):
    layer = shaken(
        FlexibleLinear(4, 3, dtype=torch.float64, rank=2, basis=options[0], size=options[1], element=options[2])
    )
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def run(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, tuple(layer.parameters()))
    layer(x).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in layer.parameters())


@pytest.mark.parametrize("options", BASES, ids=str)
def test_a_layer_computes_what_was_factorised(options):
    found = coupled(*sampled(block()), 2, basis=Basis(*options), starts=("random",), refine="none")
    layer = FlexibleLinear.from_factors(found)
    assert_close(layer(2 * X), found.evaluate(2 * X.T).T)
    assert layer.rank == 2 and layer(X[0]).shape == (8,)


@pytest.mark.parametrize("options", BASES, ids=str)
def test_a_fresh_layer_keeps_the_scale_of_linear(options):
    layer = FlexibleLinear(64, 64, bias=False, rank=256, basis=options[0], size=options[1], element=options[2])
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert 0.2 < float(layer(x).detach().square().mean()) < 0.5


def test_the_same_generator_draws_the_same_layer_and_leaves_the_global_one():
    before = torch.get_rng_state()
    layers = [FlexibleLinear(6, 4, rank=3, device="meta").to_empty(device="cpu") for _ in range(2)]
    for layer in layers:
        layer.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(dict(layers[0].state_dict()), dict(layers[1].state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("options", BASES, ids=str)
def test_it_runs_in_half_precision(options):
    layer = shaken(FlexibleLinear(4, 3, rank=2, basis=options[0], size=options[1], element=options[2]))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    half.float().sum().backward()
    assert half.dtype == torch.bfloat16 and all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert_close(half.float(), layer(x).detach(), atol=0.1, rtol=0.1)
    assert_close(copy.deepcopy(layer).bfloat16()(x.bfloat16()).float(), layer(x).detach(), atol=0.1, rtol=0.1)


def test_it_is_built_without_memory_under_a_meta_device():
    with torch.device("meta"):
        layer = FlexibleLinear(6, 4, rank=3)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(2, 6, device="meta")).shape == (2, 4)


def test_it_learns_a_function_from_scratch():
    torch.manual_seed(0)
    layer = FlexibleLinear(2, 1, rank=4, basis="legendre", size=4)
    x = torch.rand(256, 2) * 2 - 1
    y = (x[:, :1] * x[:, 1:]) + x[:, :1] ** 2
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.02 * float(y.var())


@pytest.mark.parametrize("options", [BASES[0], BASES[2], BASES[3]], ids=str)
def test_it_exports_as_plain_operations(options, tmp_path):
    layer = shaken(FlexibleLinear(4, 3, rank=2, basis=options[0], size=options[1], element=options[2]))
    assert export(layer, tmp_path / "layer.pt2", example=3 * torch.randn(5, 4)).difference < 1e-5
    assert export(layer, tmp_path / "layer.onnx", example=3 * torch.randn(5, 4)).difference < 1e-5


@pytest.mark.parametrize(
    "wrong", [dict(rank=0), dict(rank=1.5), dict(rank=2, basis="cubic"), dict(rank=2, size=0)], ids=str
)
def test_bad_layers_are_refused(wrong):
    with pytest.raises(RankfoldError):
        FlexibleLinear(4, 3, **wrong)


# --- blocks ---


def network(act="relu", dtype=torch.float64):
    return nn.Sequential(
        nn.Flatten(), *block(act, dtype=dtype), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3, dtype=dtype)
    ).eval()


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_a_block_of_full_width_is_exact(act):
    model = network(act)
    before = copy.deepcopy(model.state_dict())
    small, plan = decouple(model, "1:3", data_of(), rank=5, samples=200)
    assert_close(small(X), model(X), atol=1e-6, rtol=1e-6)
    assert plan.layers["1:3"].error < 1e-6
    assert isinstance(small[1], FlexibleLinear) and [type(m) for m in small[2:4]] == [nn.Identity] * 2
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not small.training


def test_jacobians_are_those_of_autograd():
    chain = nn.Sequential(*block(sizes=(8, 6, 7, 4)))
    found = read_block(nn.Sequential(chain), "0.0:0.4")
    wanted = torch.stack([torch.autograd.functional.jacobian(chain, row) for row in X])
    assert_close(found(X), chain(X))
    directions, rows = X[:8].T[:, :3], X[:2, :4]
    assert_close(found.jacobians(X, directions), wanted @ directions)
    assert_close(found.probes(X, rows), rows @ wanted)


def test_the_coordinates_of_a_frame_lose_nothing_where_nothing_is_compressed():
    found = read_block(network(), "1:3")
    frame = frame_of(found, X, 2, 0)
    assert_close(frame.into @ frame.back, torch.eye(8, dtype=torch.float64))
    spread = (X - frame.mean) @ frame.back.T
    assert_close(spread.T @ spread / len(X), torch.eye(8, dtype=torch.float64), atol=1e-3, rtol=0)


def test_a_compressed_frame_keeps_what_a_narrow_block_uses():
    chain = block(sizes=(60, 3, 50))
    x = torch.randn(100, 60, dtype=torch.float64)
    frame = frame_of(read_block(chain, "0:2"), x, 3, 0)
    assert frame.into.shape == (60, 22) and frame.onto.shape == (50, 22)
    jacobians = read_block(chain, "0:2").jacobians(x, torch.eye(60, dtype=torch.float64))
    kept = frame.onto @ (frame.onto.T @ jacobians @ frame.into) @ frame.back
    assert_close(kept, jacobians)
    assert affordable(frame, 100, 3, 1e9) == 100
    assert affordable(frame, 100, 3, 8 * 6 * 22 * 22 * 50) == 50
    with pytest.raises(DataError, match="memory"):
        affordable(frame, 100, 30, 8 * 6 * 22 * 22 * 20)
    small, plan = decouple(chain, "0:2", data_of(60), rank=3, samples=200)
    assert plan.layers["0:2"].error < 1e-6
    assert_close(small(x), chain(x), atol=1e-5, rtol=1e-5)


def test_a_stack_of_layers_is_one_block_and_more_neurons_are_better():
    chain = block(sizes=(6, 12, 12, 4), act="tanh")
    points = decouple_errors(chain, "0:4", data_of(6), (1, 8), samples=200)
    assert [point.rank for point in points] == [1, 8]
    assert points[1].error < 0.7 * points[0].error
    assert points[0].params < points[1].params and all(point.low_rank_error > 0 for point in points)
    straight = nn.Sequential(nn.Linear(6, 9), nn.Identity(), nn.Linear(9, 4)).double()
    (point,) = decouple_errors(straight, "0:2", data_of(6), (2,), samples=200)
    assert points[0].affine_error > 0.05 and point.affine_error < 1e-3 < point.error


class Features(nn.Module):
    """Tokens through the feed-forward part of a transformer, with a residual around it."""

    def __init__(self, inside=False, twice=False):
        super().__init__()
        self.up, self.act, self.down = block("gelu", (8, 12, 8))
        self.inside, self.twice = inside, twice

    def forward(self, x):
        hidden = self.act(self.up(x))
        if self.twice:
            hidden = 2 * hidden
        out = self.down(hidden)
        return out + hidden.sum(-1, keepdim=True) if self.inside else x + out


def test_the_block_of_a_transformer():
    model = Features().eval()
    tokens = [batch.reshape(4, 8, 8) for batch in data_of()]
    small, plan = decouple(model, "up:down", tokens, rank=4, samples=200)
    assert small(tokens[0]).shape == (4, 8, 8)
    assert plan.layers["up:down"].error < 1
    x = tokens[1]
    change = (small(x) - model(x)).norm() / (model(x) - x).norm()
    assert change < 1.2 * plan.layers["up:down"].error + 0.1


# --- plans and files ---


def test_a_plan_with_a_block_saves_loads_and_reports(tmp_path):
    model = network()
    small, plan = decouple(model, "1:3", data_of(), rank=2, samples=200, basis="legendre", size=3)
    assert Plan.from_json(plan.to_json()) == plan and "flexible(legendre,size=3)" in str(plan)
    assert plan.params == sum(p.numel() for p in small.parameters())
    save(small, plan, tmp_path / "small.safetensors")
    for skeleton in (network(), copy.deepcopy(model).to("meta")):
        loaded = load(tmp_path / "small.safetensors", skeleton)
        assert_close(loaded(X), small(X), rtol=0, atol=0)
    told = report(model, small, plan, example=X, latency=False)
    (row,) = [row for row in told.layers if row.name == "1:3"]
    assert row.params[1] < row.params[0] and row.macs == (80, 32) and row.method == "flexible"
    assert measure(small, example=X).macs == 32 + 24


def test_a_plan_with_a_block_trains_from_scratch():
    plan = Plan({"1:3": Choice("flexible", 4, {"basis": "legendre", "size": 3})})
    model = network()
    first, again, other = (apply(model, plan, init="random", seed=seed) for seed in (0, 0, 1))
    assert_close(first(X), again(X), rtol=0, atol=0)
    assert not torch.allclose(first(X), other(X))
    assert first[1].rank == 4 and first[1].down.weight.dtype == torch.float64


def test_a_plan_that_does_not_fit_is_refused(tmp_path):
    model = network()
    choice = Choice("flexible", 4)
    for layers, word in (
        ({"1": choice}, "first:last"),
        ({"1:9": choice}, "no module"),
        ({"3:1": choice}, "exchange"),
        ({"2:3": choice}, "plan"),
        ({"1:3": choice, "3": Choice("svd", 2)}, "twice"),
    ):
        with pytest.raises(PlanError, match=word):
            apply(model, Plan(layers), init="random")
    with pytest.raises(PlanError, match="decouple"):
        apply(model, Plan({"1:3": choice}))
    with pytest.raises(PlanError, match="did you mean 'flexible'"):
        Plan({"1": Choice("flexibel", 2)})
    small = apply(model, Plan({"1:3": choice}), init="random")
    for wrong in (Choice("flexible", 5), Choice("flexible", 4, {"basis": "legendre"})):
        with pytest.raises(PlanError, match="says"):
            save(small, Plan({"1:3": wrong}), tmp_path / "small.safetensors")


def test_a_budget_gives_the_highest_rank_within_it():
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
    data = data_of(12, dtype=torch.float32)
    small, plan = decouple(model, "0:2", data, budget=Budget(params=0.3), samples=60, size=3)
    total = sum(p.numel() for p in model.parameters())
    kept = sum(p.numel() for p in small.parameters())
    assert plan.params == kept <= 0.3 * total < kept + 12 + 12 + 1 + 5
    with pytest.raises(BudgetError, match="rank 1"):
        decouple(model, "0:2", data, budget=Budget(params=0.01))
    with pytest.raises(BudgetError, match="params"):
        decouple(model, "0:2", data, budget=Budget(macs=0.5))
    for also in ({"macs": 0.5}, {"bytes": 0.5}, {"latency": 0.5}):
        with pytest.raises(BudgetError, match="params alone"):
            decouple(model, "0:2", data, budget=Budget(params=0.5, **also))


def test_same_seed_same_block():
    model = network()
    runs = [decouple(model, "1:3", data_of(), rank=3, samples=100, seed=seed)[0](X) for seed in (1, 1)]
    assert torch.equal(*runs)


def test_fitting_the_values_at_more_rows_serves_inputs_that_it_has_not_seen():
    chain = block(sizes=(20, 8, 4))
    data, fresh = data_of(20, batches=30), data_of(20, batches=31)[-1]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    options = {"size": 4, "samples": 40}
    found = {rows: decouple(chain, "0:2", data, rank=3, rows=rows, **options) for rows in (0, 900)}
    assert torch.equal(before, torch.get_rng_state())
    errors = {rows: (small(fresh) - chain(fresh)).norm() for rows, (small, _) in found.items()}
    assert errors[900] < 0.95 * errors[0]
    (point,) = decouple_errors(chain, "0:2", data, (3,), rows=900, **options)
    assert point.error == found[900][1].layers["0:2"].error


def test_a_fit_of_the_values_that_is_no_better_is_dropped(monkeypatch):
    found, layer = read_block(block(), "0:2"), FlexibleLinear(8, 8, rank=3, size=3).double()
    assert fitted_to_values(layer, found, X[:30], X[30:], 0) is not layer
    monkeypatch.setattr("rankfold.train.flexible._block_fit.RATE", 1e4)
    assert fitted_to_values(layer, found, X[:30], X[30:], 0) is layer


# --- what is refused, with the model left as it was ---

NAN = [torch.full((32, 8), torch.nan, dtype=torch.float64)] * 10
REFUSED = [
    (network, "1:7", data_of(), dict(rank=2), PlanError, "no module '7'"),
    (network, "1", data_of(), dict(rank=2), PlanError, "first:last"),
    (network, "0:3", data_of(), dict(rank=2), LayerError, "begins"),
    (lambda: Features(inside=True), "up:down", data_of(), dict(rank=2), LayerError, "branch"),
    (lambda: Features(twice=True), "up:down", data_of(), dict(rank=2), LayerError, "between"),
    (
        lambda: nn.Sequential(block()[0], nn.Softmax(-1), block()[2]),
        "0:2",
        data_of(),
        dict(rank=2),
        LayerError,
        "pointwise",
    ),
    (
        lambda: nn.Sequential(block()[0], nn.LayerNorm(5).double(), block()[2]),
        "0:2",
        data_of(),
        dict(rank=2),
        LayerError,
        "1",
    ),
    (network, "1:3", data_of(batches=1), dict(rank=30), DataError, "too few"),
    (network, "1:3", NAN, dict(rank=2), DataError, "NaN"),
    (network, "1:3", [], dict(rank=2), DataError, "no batch"),
    (network, "1:3", X, dict(rank=2), DataError, "iterable"),
    (network, "1:3", data_of(), dict(rank=0), RankfoldError, "rank"),
    (network, "1:3", data_of(), dict(), RankfoldError, "either"),
    (network, "1:3", data_of(), dict(rank=2, samples=1), RankfoldError, "samples"),
    (network, "1:3", data_of(), dict(rank=2, rows=-1), RankfoldError, "rows"),
    (network, "1:3", data_of(), dict(rank=2, basis="cubic"), RankfoldError, "basis"),
    (network, "1:3", data_of(), dict(rank=2, memory=10), DataError, "memory"),
]


@pytest.mark.parametrize(
    ("make", "name", "data", "options", "kind", "word"), REFUSED, ids=[f"{r[1]}-{r[5]}" for r in REFUSED]
)
def test_bad_input_leaves_the_model_as_it_was(make, name, data, options, kind, word):
    model = make().train()
    state, modules = copy.deepcopy(model.state_dict()), [(id(m), m.training, dict(vars(m))) for m in model.modules()]
    with pytest.raises(kind, match=word):
        decouple(model, name, data, **options)
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert [(id(m), m.training) for m in model.modules()] == [(one, mode) for one, mode, _ in modules]
    assert [set(vars(m)) for m in model.modules()] == [set(names) for _, _, names in modules]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_module_that_is_used_elsewhere_is_refused():
    chain = block()
    model = nn.Sequential(chain[0], chain[1], chain[2], chain[1])
    with pytest.raises(PlanError, match="too"):
        decouple(model, "0:2", data_of(), rank=2)
