"""Does recalibration solve what it says, on the inputs that layers really get, and never make anything worse?"""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import rankfold as rf
from rankfold._common import output_error
from rankfold.errors import DataError
from rankfold.layers import TABLE
from rankfold.recalibration import Refitting, _recalibrate, recalibrate
from rankfold.recalibration._pairs import Pairs
from rankfold.recalibration._passes import Calibration
from rankfold.recalibration._refit import refit
from rankfold.recalibration._solve import alternated, projected, ridge
from rankfold.surgery import apply


def rows(*shape, seed=0):
    """Correlated rows with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[-1], shape[-1], generator=generator, dtype=torch.float64)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) @ mixing + 0.5


def pairs_of(x, y):
    pairs = Pairs.empty(len(x), x.shape[2], y.shape[1] // len(x), x.device)
    pairs.add(x, y)
    return pairs


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)]
    return nn.Sequential(*layers)


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=2, padding_mode="circular", padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).eval()


def shrunk(model, **ranks):
    choices = {name.replace("_", "."): rf.Choice("svd", rank=rank) for name, rank in ranks.items()}
    return apply(model, rf.Plan(choices))


DATA = [rows(64, 12, seed=k).float() for k in range(3)]
PICTURES = [torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def recalibrated(small, model, data, **options):
    seen = []
    result = recalibrate(small, model, data, watch=seen.append, **told(**options))
    return result, seen[0]


def told(**options):
    """The arguments of `recalibrate`, with those of a `Refitting` gathered in one."""
    own = {name: options.pop(name) for name in ("include_dense", "per_pass", "damping") if name in options}
    return {**options, "refitting": Refitting(**own)} if own else options


# --- what is solved ---


@pytest.mark.parametrize("centred", [False, True])
def test_ridge_is_least_squares_towards_the_weight(centred):
    x, weight = rows(2, 40, 6), rows(2, 3, 6, seed=1)
    y = rows(40, 6, seed=2)
    found = ridge(pairs_of(x, y), weight, 0.05, centred=centred)
    for group in range(2):
        inputs, wanted = x[group], y[:, 3 * group : 3 * group + 3]
        if centred:
            inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
        eps = 0.05 * inputs.square().sum(0).mean() / 40
        tall = torch.cat([inputs, (40 * eps).sqrt() * torch.eye(6, dtype=torch.float64)])
        right = torch.cat([wanted, (40 * eps).sqrt() * weight[group].T])
        assert_close(found.weight[group], torch.linalg.lstsq(tall, right).solution.T)


def test_projection_is_reduced_rank_regression():
    x, y = rows(1, 200, 6), rows(200, 5, seed=2)
    pairs = pairs_of(x, y)
    found = projected(ridge(pairs, torch.zeros(1, 5, 6, dtype=torch.float64), 1e-12, centred=False), 2)
    fitted = x[0] @ torch.linalg.lstsq(x[0], y).solution
    _, _, directions = torch.linalg.svd(fitted, full_matrices=False)
    oracle = fitted @ directions[:2].T @ directions[:2]
    assert torch.linalg.matrix_rank(found[0], rtol=1e-9) == 2
    assert_close(x[0] @ found[0].T, oracle, rtol=1e-6, atol=1e-6)
    assert pairs.loss(found, None) == pytest.approx((y - oracle).square().sum().item() / 200)


def test_factors_in_turn_find_what_the_closed_form_does():
    dense = nn.Linear(10, 8, dtype=torch.float64)
    layer = rf.layers.LowRankLinear.from_dense(dense, rank=3)
    x = rows(1, 300, 10)
    pairs = pairs_of(x, x[0] @ rows(8, 10, seed=5).T)
    target = ridge(pairs, dense.weight.detach()[None], 1e-3, centred=False)
    best = pairs.loss(projected(target, 3), None)
    start = pairs.loss(layer.weight.detach()[None], None)
    for _ in range(20):
        layer = alternated(layer, target)
    assert pairs.loss(layer.weight.detach()[None], None) < best + 1e-3 * (start - best)


def test_the_loss_and_the_bias_are_those_of_the_rows():
    x, y, weight = rows(2, 30, 4), rows(30, 6, seed=1), rows(2, 3, 4, seed=2)
    pairs = pairs_of(x[:, :10], y[:10]) + pairs_of(x[:, 10:], y[10:])
    bias = pairs.bias(weight)
    outputs = torch.cat([x[g] @ weight[g].T for g in range(2)], 1)
    assert_close(bias.flatten(), (y - outputs).mean(0))
    assert pairs.loss(weight, None) == pytest.approx((y - outputs).square().sum().item() / 30)
    error = (y - outputs - bias.flatten()).square().sum().item() / 30
    assert pairs.loss(weight, bias) == pytest.approx(error)


def made(kind, method):
    torch.manual_seed(1)
    if kind is nn.Linear:
        return kind(16, 16)
    kernel = {nn.Conv1d: 3, nn.Conv2d: (3, 3), nn.Conv3d: (1, 3, 3)}[kind]
    return kind(8, 8, kernel, bias=method != "cp", groups=2 if method == "svd" else 1)


ROWS = [(kind, method) for kind, method in TABLE if kind is not nn.Embedding]


def test_inputs_that_say_nothing_change_nothing():
    dense = nn.Linear(6, 4)
    layer = rf.layers.LowRankLinear.from_dense(dense, rank=2)
    zero, far = torch.zeros(1, 40, 6), 1e4 + 1e-3 * rows(1, 40, 6).float()
    for x in (zero, far):
        solve = pairs_of(x, x[0] @ layer.weight.detach().T + layer.bias.detach())
        outcome = refit(layer, solve, solve, None)
        assert outcome.after <= outcome.before
        assert outcome.state is None or all(torch.isfinite(value).all() for value in outcome.state.values())


@pytest.mark.parametrize(("kind", "method"), ROWS, ids=lambda value: getattr(value, "__name__", value))
def test_every_kind_of_layer_is_refitted(kind, method):
    dense = made(kind, method)
    cls = rf.layers.layer_class(dense, method)
    for options in cls.variants(dense)[-1:]:
        grid = cls.rank_grid(dense, **options)
        layer = cls.from_dense(dense, rank=grid[len(grid) // 2], **options)
        before = copy.deepcopy(layer.state_dict())
        groups, n = rf.layers.row_size(dense)
        x = rows(groups, 400, n).float()
        twisted = rows(1, 1, groups * n, seed=7)[0, 0].reshape(groups, 1, n) / 10
        weight = dense.weight.detach().double().reshape(groups, -1, n) + twisted
        y = torch.cat([x[g].double() @ weight[g].T for g in range(groups)], 1)
        outcome = refit(layer, pairs_of(x[:, :300], y[:300]), pairs_of(x[:, 300:], y[300:]), None)
        assert outcome.state is not None and outcome.after < 0.9 * outcome.before, options
        assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
        layer.load_state_dict(outcome.state)
        assert layer.weight.dtype == torch.float32


def test_what_is_not_better_on_the_rows_left_out_is_not_taken():
    dense = nn.Linear(10, 6)
    layer = rf.layers.LowRankLinear.from_dense(dense, rank=6)
    x = rows(1, 12, 10).float()
    noise = rows(12, 6, seed=3)
    y = (x[0] @ dense.weight.detach().T).double()
    solve, check = pairs_of(x[:, :6], y[:6] + noise[:6]), pairs_of(x[:, 6:], y[6:])
    outcome = refit(layer, solve, check, 1e-6)
    assert outcome.state is None and outcome.after == outcome.before


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_outputs_count_by_their_weights(method):
    """The outputs that matter come out better than where all count alike, and their weighted error is the least."""
    dense = nn.Linear(12, 8)
    cls = rf.layers.layer_class(dense, method)
    options = cls.variants(dense)[0]
    layer = cls.from_dense(dense, rank=2, **options) if method == "svd" else cls.from_dense(dense, rank=1, **options)
    x, weights = rows(1, 400, 12).float(), torch.tensor([100.0] * 2 + [1.0] * 6)
    y = x[0].double() @ rows(12, 8, seed=5) / 10
    solve, check = pairs_of(x[:, :300], y[:300]), pairs_of(x[:, 300:], y[300:])

    def errors(given):
        found = copy.deepcopy(layer)
        found.load_state_dict(refit(layer, solve, check, 1e-3, given).state)
        return (found(x[0]) - y).double().square().mean(0).detach()

    alike, weighted = errors(None), errors(weights)
    assert weighted[:2].sum() < 0.9 * alike[:2].sum()
    assert (weighted * weights).sum() < (alike * weights).sum()
    assert_close(errors(torch.ones(8)), alike, rtol=1e-4, atol=1e-6)


# --- whole models ---


def test_statistics_with_gradients_weigh_the_outputs():
    model = network()
    small = shrunk(model, **{"0": 5, "2": 6})
    batches = [(x, torch.zeros(64, dtype=torch.long)) for x in DATA]
    stats = rf.measure(model, batches, moments=True, loss=nn.functional.cross_entropy)
    plain, _ = recalibrated(small, model, batches)
    weighted, report = recalibrated(small, model, batches, stats=stats)
    assert report.error_after <= report.error_before
    assert not torch.equal(weighted[0].up.weight, plain[0].up.weight)
    with pytest.raises(DataError, match="loss"):
        recalibrate(small, model, batches, stats=rf.measure(model, batches, moments=True))


def test_drift_beats_a_layer_fitted_to_what_it_got_in_the_original():
    model = network()
    small = shrunk(model, **{"0": 4, "2": 6})
    result, _ = recalibrated(small, model, DATA, include_dense=False)
    x = torch.cat(DATA)
    hidden = model[:2](x)
    without_drift = shrunk(model, **{"0": 4, "2": 6})
    second, mean = hidden.T @ hidden / len(x), hidden.mean(0)
    metric = rf.layers.Metric(second.detach().double()[None], mean.detach().double()[None])
    without_drift[2] = rf.layers.LowRankLinear.from_dense(model[2], rank=6, metric=metric)
    without_drift[0] = result[0]
    assert output_error(model, result, DATA) < 0.97 * output_error(model, without_drift, DATA)


CHOICES = {
    "svd": rf.Choice("svd", rank=5, options={"split": "channel"}),
    "spatial": rf.Choice("svd", rank=9, options={"split": "spatial"}),
    "cp": rf.Choice("cp", rank=12),
    "tucker": rf.Choice("tucker", rank=(5, 4)),
}


@pytest.mark.parametrize(
    ("method", "per_pass"), [("svd", 1), ("svd", 2), ("svd", None), ("spatial", 1), ("cp", 1), ("tucker", 1)]
)
def test_the_error_of_the_outputs_falls(method, per_pass):
    model = images()
    small = apply(model, rf.Plan({"3": CHOICES[method], "5": rf.Choice("svd", rank=3)}))
    before = copy.deepcopy(small.state_dict())
    result, report = recalibrated(small, model, PICTURES, per_pass=per_pass)
    assert report.error_before == pytest.approx(output_error(model, small, PICTURES))
    assert report.error_after == pytest.approx(output_error(model, result, PICTURES), rel=1e-4)
    if per_pass is None:  # layers that know nothing of each other may end worse, and are then undone
        assert report.error_after <= report.error_before
        return
    assert report.error_after < 0.9 * report.error_before
    assert_close(dict(small.state_dict()), dict(before), rtol=0, atol=0)
    assert any(layer.kept and layer.after < layer.before for layer in report.layers)


def test_a_pass_that_makes_the_outputs_worse_is_undone(monkeypatch):
    model = network()
    small = shrunk(model, **{"0": 4, "2": 6})

    def spoilt(layer, solve, check, damping, weights):
        found = refit(layer, solve, check, damping, weights)
        if layer is not None and solve.xx.shape[1] == 24 and found.state is not None:
            return found._replace(state={key: 3 * value for key, value in found.state.items()})
        return found

    monkeypatch.setattr(_recalibrate, "refit", spoilt)
    result, report = recalibrated(small, model, DATA)
    assert report.layers[0].kept and not report.layers[-1].kept
    assert report.error_after == pytest.approx(output_error(model, result, DATA), rel=1e-4)
    assert report.error_after <= report.error_before
    assert_close(result[4].weight, small[4].weight, rtol=0, atol=0)


def test_dense_layers_behind_the_first_compressed_one():
    model = network()
    small = shrunk(model, **{"2": 6})
    _, report = recalibrated(small, model, DATA)
    assert [layer.name for layer in report.layers] == ["2", "4"]
    assert report.left_out == {"0": _recalibrate.DENSE_FIRST}
    _, report = recalibrated(small, model, DATA, include_dense=False)
    assert [layer.name for layer in report.layers] == ["2"] and not report.left_out


def test_layers_that_can_not_be_fitted_are_named():
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[3].weight = model[1].weight
    plan = rf.Plan({"0": rf.Choice("svd", rank=4)})
    tokens = [torch.arange(30).reshape(5, 6)]
    _, report = recalibrated(apply(model, plan), model, tokens)
    assert "does not multiply" in report.left_out["0"] and "shares a weight" in report.left_out["1"]
    small = shrunk(network(), **{"0": 4})
    _, report = recalibrated(small, network(), DATA, memory=5000)
    assert (
        "bytes" in report.left_out["2"] and [layer.name for layer in report.layers] == ["0", "4"][: len(report.layers)]
    )


def test_a_small_memory_changes_nothing_but_the_number_of_runs(monkeypatch):
    model = network()
    small = shrunk(model, **{"0": 4, "2": 6})
    needed = max(_recalibrate.bytes_of(layer) for layer in (model[0], model[2]))
    wanted, _ = recalibrated(small, model, DATA, include_dense=False)
    found, report = recalibrated(small, model, DATA, include_dense=False, memory=needed)
    assert len(report.layers) == 2
    monkeypatch.setattr(Calibration, "_all", lambda *_: 2**40)
    again, same = recalibrated(small, model, DATA, include_dense=False, memory=needed)
    assert same.error_after == pytest.approx(report.error_after)
    assert_close(dict(again.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)
    assert_close(dict(found.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)


def test_with_little_memory_the_second_stage_is_solved_for():
    model = images()
    small = shrunk(model, **{"3": 6, "5": 3})
    wanted = _recalibrate.bytes_of(small[5].up)
    assert _recalibrate.bytes_of(small[5]) > 4000 > wanted
    result, report = recalibrated(small, model, PICTURES, memory=4000, include_dense=False, patches=100)
    assert [layer.kept for layer in report.layers] == [True, True]
    assert_close(result[5].down.weight, small[5].down.weight, rtol=0, atol=0)
    assert report.error_after < report.error_before
    outputs = [
        (layer(net[:5](torch.cat(PICTURES))) - model[:6](torch.cat(PICTURES))).norm().item()
        for net, layer in ((result, result[5]), (result, small[5]))
    ]
    assert outputs[0] < outputs[1]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.shared(torch.relu(self.shared(torch.relu(self.first(x)))))


def test_a_layer_that_is_called_twice_is_fitted_to_both_calls():
    torch.manual_seed(0)
    model = Twice()
    small = apply(model, rf.Plan({"first": rf.Choice("svd", rank=4), "shared": rf.Choice("svd", rank=5)}))
    result, report = recalibrated(small, model, DATA)
    assert [layer.name for layer in report.layers] == ["first", "shared"]
    assert report.error_after < report.error_before
    assert output_error(model, result, DATA) == pytest.approx(report.error_after, rel=1e-4)


def test_projections_of_an_attention_are_layers_like_others():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    ranks = {"self_attn.q_proj": 3, "self_attn.v_proj": 4, "linear1": 5}
    small = apply(model, rf.Plan({name: rf.Choice("svd", rank=rank) for name, rank in ranks.items()}))
    _, report = recalibrated(small, model, [x.reshape(8, 8, 12) for x in DATA])
    assert {layer.name for layer in report.layers} > set(ranks)
    assert not {name for name in report.left_out if name in ranks}
    assert report.error_after < 0.9 * report.error_before


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        del labels
        return {"logits": self.net(x)}


@pytest.mark.parametrize(
    "loader",
    [
        [(x, torch.zeros(len(x))) for x in DATA],
        [{"x": x, "labels": torch.zeros(len(x))} for x in DATA],
        torch.utils.data.DataLoader(torch.cat(DATA), batch_size=64),
    ],
    ids=["tuples", "dicts", "tensors"],
)
def test_loaders(loader):
    model = Named()
    small = apply(model, rf.Plan({"net.0": rf.Choice("svd", rank=4)}))
    wanted = recalibrate(small, model, DATA)
    assert_close(dict(recalibrate(small, model, loader).state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)


def test_padding_tokens_do_not_count():
    model = Named()
    small = apply(model, rf.Plan({"net.0": rf.Choice("svd", rank=4)}))
    tokens = torch.stack(DATA)
    padded = torch.cat([tokens, torch.full((3, 8, 12), 50.0)], 1)
    mask = torch.arange(72).expand(3, -1) < 64
    _, plain = recalibrated(small, model, [tokens])
    _, masked = recalibrated(small, model, [padded], mask=lambda _: mask)
    assert masked.layers[0].before == pytest.approx(plain.layers[0].before, rel=1e-5)


# --- what it refuses, and what it leaves alone ---


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "empty"),
        ((x for x in DATA), {}, "batches="),
        (DATA[0], {}, "not a tensor"),
        (DATA, {"batches": 0}, "batches"),
        (DATA, {"per_pass": 0}, "per_pass"),
        (DATA, {"damping": 0.0}, "damping"),
        (DATA, {"patches": 0}, "patches"),
        ([DATA[0], DATA[1] * torch.nan], {}, "batch 1.*layer '0'.*NaN"),
        (["text"], {}, "a batch must be"),
    ],
)
def test_refusals(loader, options, message):
    model = network()
    with pytest.raises(DataError, match=message):
        recalibrate(shrunk(model, **{"0": 4}), model, loader, **told(**options))


def test_the_same_seed_gives_the_same_model():
    model = images()
    small = shrunk(model, **{"3": 4})
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = recalibrate(small, model, PICTURES, patches=5)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (recalibrate(small, model, PICTURES, patches=5, seed=seed) for seed in (0, 1))
    assert_close(dict(first.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    assert not torch.equal(first[3].down.weight, other[3].down.weight)


def test_an_interruption_leaves_both_models_as_they_were(monkeypatch):
    model = images().train()
    small = shrunk(model, **{"3": 4, "5": 3}).train()
    states = [copy.deepcopy(net.state_dict()) for net in (model, small)]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_recalibrate, "refit", stop)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(small, model, PICTURES)
    for net, state in zip((model, small), states, strict=True):
        assert_close(dict(net.state_dict()), dict(state), rtol=0, atol=0)
        assert all(module.training and not module._forward_hooks for module in net.modules())


def test_dense_layers_behind_a_flexible_block():
    """What comes after a flexible layer is fitted to its values, the layer itself and what is before it are not."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 5))
    data = list(rows(4, 64, 12).float())
    small = apply(model, rf.Plan({"1:3": rf.Choice("flexible", 4)}), init="random")
    seen = []
    better = recalibrate(small, model, data, watch=seen.append)
    (done,) = seen
    assert [layer.name for layer in done.layers] == ["4"]
    assert done.error_after < done.error_before
    assert output_error(model, better, data) < output_error(model, small, data)
    for before, after in zip(small[1].parameters(), better[1].parameters(), strict=True):
        assert torch.equal(before, after)
