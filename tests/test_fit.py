"""Does training learn, obey its recipe, and leave alone what is not its own?"""

import copy
import math

import pytest
import torch
from cases_train import accuracy, assert_same, data, loader, network, tensors
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from rankfold.errors import DataError, RankfoldError
from rankfold.layers import LowRankLinear
from rankfold.train import Recipe, fit
from rankfold.train._fit import trained_groups
from rankfold.train._losses import distillation_loss, product_decay

PLAIN = {"batchnorm": 0, "warmup": 0.0, "schedule": "constant", "decay": 0.0}


# --- does it learn ---


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("adamw", 0.02), ("sgd", 0.1), (lambda groups, lr: torch.optim.Adam(groups, lr=lr), 0.02)]
)
def test_the_task_is_learnt(optimizer, lr):
    model = network()
    history = fit(model, loader(), epochs=12, lr=lr, evaluate=accuracy, recipe=Recipe(optimizer=optimizer))
    assert [row.epoch for row in history.epochs] == list(range(1, 13))
    assert history.epochs[-1].loss < 0.6 * history.epochs[0].loss
    assert history.epochs[-1].metric > 0.7
    assert history.kept == 12


def test_a_student_learns_from_unlabelled_data():
    teacher, student = network(), copy.deepcopy(network())
    with torch.no_grad():
        student[0].weight.mul_(0.1)
    batches = [(x,) for x in data(256)[0].split(32)]
    history = fit(student, batches, teacher=teacher, epochs=15, lr=0.01)
    assert history.epochs[-1].task is None
    assert history.epochs[-1].distillation < 0.3 * history.epochs[0].distillation


def test_the_loss_is_the_sum_of_its_terms():
    model = nn.Sequential(LowRankLinear(6, 3, rank=2))
    teacher = nn.Linear(6, 3)
    x, y = data()
    recipe = Recipe(**{**PLAIN, "decay": 0.3}, temperature=3.0, alpha=0.6)
    with torch.no_grad():
        task = F.cross_entropy(model(x), y)
        soft = F.softmax(teacher(x) / 3, -1)
        distillation = 9 * (soft * (soft.log() - F.log_softmax(model(x) / 3, -1))).sum() / len(x)
        decay = 0.5 * model[0].weight.square().sum()
    row = fit(model, [(x, y)], teacher=teacher, recipe=recipe).epochs[0]
    found = [row.task, row.distillation, row.decay, row.loss]
    wanted = torch.stack([task, distillation, decay, 0.4 * task + 0.6 * distillation + 0.3 * decay])
    assert_close(torch.tensor(found), wanted, rtol=1e-5, atol=1e-6)


def test_distillation_runs_in_float32_over_every_position():
    student, teacher = torch.randn(4, 5, 7, 7), torch.randn(4, 5, 7, 7)
    flat = [x.bfloat16().float().movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    wanted = F.kl_div(F.log_softmax(flat[0], -1), F.softmax(flat[1], -1), reduction="batchmean")
    found = distillation_loss(student.bfloat16(), teacher.bfloat16(), 1.0)
    assert found.dtype == torch.float32
    assert_close(found, wanted)
    tokens = [{"logits": x.movedim(1, -1)} for x in (student, teacher)]
    assert_close(distillation_loss(*tokens, 1.0), distillation_loss(student, teacher, 1.0))


def test_decay_is_of_the_product_and_factors_have_no_other():
    layer = LowRankLinear(8, 6, rank=3)
    by_factors = torch.autograd.grad(product_decay([layer]), list(layer.parameters()), allow_unused=True)
    by_product = torch.autograd.grad(0.5 * layer.weight.square().sum(), list(layer.parameters()), allow_unused=True)
    assert_close(by_factors, by_product)
    model = nn.Sequential(layer, nn.LayerNorm(6), nn.Linear(6, 2))
    groups = trained_groups(model, 0.1)
    decayed = [id(p) for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed == [id(model[2].weight)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


class Own(nn.Module):
    """Answers as a Hugging Face model does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"logits": logits, "loss": None if labels is None else 2 * F.cross_entropy(logits, labels)}


def test_a_model_may_return_its_own_loss():
    x, y = data()
    model = Own()
    wanted = 2 * F.cross_entropy(model.layer(x), y)
    row = fit(model, [{"x": x, "labels": y}], recipe=Recipe(**PLAIN)).epochs[0]
    assert row.loss == pytest.approx(wanted.item())
    row = fit(Own(), [{"x": x, "labels": y}], teacher=Own(), recipe=Recipe(**PLAIN)).epochs[0]
    assert row.distillation is not None and row.task is not None


def test_the_users_loss_is_used():
    x = torch.randn(32, 6)
    model = nn.Linear(6, 1)
    history = fit(model, [(x, x[:, :1])], epochs=40, lr=0.1, recipe=Recipe(loss=F.mse_loss))
    assert history.epochs[-1].loss < 0.05 * history.epochs[0].loss


# --- does it obey its recipe ---


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    recipe = Recipe(optimizer=lambda groups, lr: Recording(groups, lr=lr), warmup=0.25)
    history = fit(network(), loader(16 * 10), epochs=2, lr=0.5, recipe=recipe)
    assert len(rates) == 20
    peak = rates.index(max(rates))
    assert 4 <= peak <= 5 and 0.48 < rates[peak] <= 0.5
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(0.05) and rates[-1] < 0.005
    assert history.epochs[0].lr == rates[9] and history.epochs[1].lr == rates[-1]


def test_the_gradient_is_clipped():
    x, y = data()
    for clip, wanted in ((1e-3, 1e-3), (math.inf, None)):
        model = nn.Linear(6, 3)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        F.cross_entropy(model(x), y).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        recipe = Recipe(**PLAIN, clip=clip, optimizer=lambda groups, lr: torch.optim.SGD(groups, lr=lr))
        fit(model, [(x, y)], lr=1.0, recipe=recipe)
        moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
        assert moved == pytest.approx(wanted or norm, rel=1e-3)


def test_the_best_epoch_is_kept():
    metrics = iter([0.1, 0.9, 0.5])
    model, seen = network(), []

    def evaluate(model):
        seen.append(tensors(model))
        return next(metrics)

    history = fit(model, loader(), epochs=3, evaluate=evaluate, recipe=Recipe(keep_best=True))
    assert history.kept == 2 and [row.metric for row in history.epochs] == [0.1, 0.9, 0.5]
    assert_same(model, seen[1])


def test_evaluation_is_in_eval_mode_without_gradients_and_training_is_not():
    model, modes = network().eval(), []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    with torch.no_grad():
        fit(model, loader(16), evaluate=accuracy, recipe=Recipe(batchnorm=0))
    assert modes == [(True, True), (False, False)]
    assert not any(module.training for module in model.modules())


def test_a_loader_of_unknown_length_will_do():
    history = fit(network(), (batch for batch in list(loader())), recipe=Recipe(batchnorm=0))
    assert history.epochs[0].loss > 0


RECIPES = [
    {"optimizer": "lion"},
    {"schedule": "step"},
    {"warmup": 1.5},
    {"temperature": 0.0},
    {"alpha": 2.0},
    {"alpha": math.nan},
    {"decay": -1.0},
    {"weight_decay": -1.0},
    {"clip": 0.0},
    {"batchnorm": -1},
]


@pytest.mark.parametrize("setting", RECIPES, ids=str)
def test_a_recipe_out_of_range_is_refused(setting):
    with pytest.raises(RankfoldError, match=next(iter(setting))):
        Recipe(**setting)


def test_arguments_out_of_range_are_refused():
    shared = network()
    frozen = network().requires_grad_(False)
    for problem, model, options in [
        ("epochs", network(), {"epochs": 0}),
        ("lr", network(), {"lr": 0.0}),
        ("keep_best", network(), {"recipe": Recipe(keep_best=True)}),
        ("shares 0.weight", shared, {"teacher": shared}),
        ("nothing to train", frozen, {}),
        ("meta device", network().to("meta"), {}),
    ]:
        with pytest.raises(RankfoldError, match=problem):
            fit(model, loader(), **options)


# --- what does it leave alone ---


def test_the_teacher_is_untouched():
    teacher, student = network().train(), network()
    before = tensors(teacher)
    fit(student, loader(), teacher=teacher, epochs=2)
    assert_same(teacher, before)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(module.training for module in teacher.modules())


def test_randomness_is_its_own():
    before = torch.get_rng_state()
    results = []
    for seed in (5, 5, 6):
        model = network()
        torch.set_rng_state(before)
        fit(model, loader(), epochs=2, recipe=Recipe(seed=seed))
        assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
        results.append(tensors(model))
        torch.rand(3)
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert not torch.equal(results[0]["0.weight"], results[2]["0.weight"])


def test_frozen_weights_and_modes_stay():
    model = network().train()
    model[0].requires_grad_(False)
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = tensors(model)
    fit(model, loader(), epochs=2)
    assert_close(model[0].state_dict(), {k[2:]: v for k, v in before.items() if k.startswith("0.")}, rtol=0, atol=0)
    assert not torch.equal(model[4].weight, before["4.weight"])
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


# --- what if something goes wrong ---


@pytest.mark.parametrize("epoch", [1, 2])
def test_nan_brings_the_last_good_model_back(epoch):
    x, y = data()
    good, bad = [(x, y), (x, y)], [(x, y), (x * math.nan, y)]

    class Epochs:
        count = 0

        def __iter__(self):
            self.count += 1
            return iter(bad if self.count == epoch else good)

    wanted = network()
    if epoch == 2:
        fit(wanted, good, epochs=1, recipe=Recipe(**PLAIN))
    model = network().eval()
    with pytest.raises(RankfoldError, match=f"epoch {epoch}, step 2"):
        fit(model, Epochs(), epochs=3, recipe=Recipe(**PLAIN))
    assert_same(model, tensors(wanted))
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_an_infinite_gradient_is_named():
    model = nn.Linear(6, 3)
    before = tensors(model)
    with pytest.raises(RankfoldError, match="norm of the gradient"):
        fit(model, [data()], recipe=Recipe(**PLAIN, loss=lambda output, _: (output * 0).sum().sqrt()))
    assert_same(model, before)


def test_weights_that_overflow_are_named():
    model = nn.Linear(6, 3)
    before = tensors(model)

    class Overflowing(torch.optim.SGD):
        def step(self, *_):
            model.weight.data[0, 0] = math.inf

    with pytest.raises(RankfoldError, match="a weight is NaN or Inf in epoch 1"):
        fit(model, [data()], recipe=Recipe(**PLAIN, optimizer=lambda groups, lr: Overflowing(groups, lr=lr)))
    assert_same(model, before)


def test_loaders_that_will_not_do():
    x, y = data()
    with pytest.raises(DataError, match="no batch in epoch 1"):
        fit(nn.Linear(6, 3), [])
    with pytest.raises(DataError, match="no batch"):
        fit(network(), [])
    with pytest.raises(DataError, match="needed 2 times"):
        fit(nn.Linear(6, 3), iter([(x, y)]), epochs=2)
    with pytest.raises(DataError, match="no target and there is no teacher"):
        fit(nn.Linear(6, 3), [(x,)])
    with pytest.raises(RankfoldError, match="needs the same"):
        fit(nn.Linear(6, 3), [(x,)], teacher=nn.Linear(6, 4))


# --- only the factors, and no longer than the promise takes ---


def test_only_the_factors_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(6, 8, rank=2), nn.BatchNorm1d(8), nn.Linear(8, 3))
    before = tensors(model)
    fit(model, loader(), recipe=Recipe(only="factors", batchnorm=0), lr=0.1)
    after = tensors(model)
    weights = {name for name, _ in model.named_parameters() if not torch.equal(before[name], after[name])}
    assert weights == {"0.down.weight", "0.up.weight", "0.up.bias"}
    assert model[0].rank == 2
    with pytest.raises(RankfoldError, match="factorised"):
        fit(network(), loader(), recipe=Recipe(only="factors"))


def test_training_ends_with_the_epoch_that_keeps_the_promise(tmp_path):
    metrics = [0.3, 0.8, 0.9]
    seen, states = iter(metrics), []

    def evaluate(model):
        states.append(tensors(model))
        return next(seen)

    model, path = network(), tmp_path / "run.safetensors"
    history = fit(model, loader(), epochs=5, evaluate=evaluate, recipe=Recipe(promise=0.75, checkpoint=path))
    assert [row.metric for row in history.epochs] == metrics[:2] and history.kept == 2
    assert_same(model, states[1])
    again = network()
    fit(again, loader(), epochs=5, evaluate=evaluate, recipe=Recipe(promise=0.75, checkpoint=path))
    assert_same(again, states[1])
    assert next(seen) == 0.9


def test_a_promise_that_is_not_kept_ends_with_the_best_epoch():
    seen, states = iter([0.3, 0.6, 0.5]), []

    def evaluate(model):
        states.append(tensors(model))
        return next(seen)

    model = network()
    history = fit(model, loader(), epochs=3, evaluate=evaluate, recipe=Recipe(promise=0.75))
    assert len(history.epochs) == 3 and history.kept == 2
    assert_same(model, states[1])
    with pytest.raises(RankfoldError, match="promise needs evaluate"):
        fit(model, loader(), recipe=Recipe(promise=0.75))
