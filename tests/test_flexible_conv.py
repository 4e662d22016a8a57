"""Can a flexible layer over channels stand for convolutions of kernel 1, and is everything else refused?"""

import copy

import pytest
import torch
from cases_flexible import ACTS, block
from torch import nn
from torch.testing import assert_close

from rankfold import Budget, Choice, Plan, apply, densify, fold_batchnorm, load, measure, report, save
from rankfold.errors import BudgetError, LayerError, PlanError
from rankfold.exporters import export
from rankfold.layers import FlexibleConv1d, FlexibleConv2d, FlexibleConv3d, FlexibleLinear, pointwise_twin
from rankfold.train import decouple, decouple_errors
from rankfold.train.flexible._block_data import read_block

KINDS = [(FlexibleConv1d, nn.Conv1d, (5,)), (FlexibleConv2d, nn.Conv2d, (4, 3)), (FlexibleConv3d, nn.Conv3d, (2, 3, 2))]
IMAGES = [
    torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(8)
]


def convolved(chain, kind=nn.Conv2d):
    """Return convolutions of kernel 1 with the weights of a chain of linear layers."""
    stages = []
    for stage in chain:
        if isinstance(stage, nn.Linear):
            conv = kind(stage.in_features, stage.out_features, 1, dtype=stage.weight.dtype)
            conv.load_state_dict({"weight": stage.weight.reshape(conv.weight.shape), "bias": stage.bias})
            stage = conv
        stages.append(stage)
    return nn.Sequential(*stages)


def network(act="relu", sizes=(8, 5, 8)):
    """A convolution block with a convolution of kernel 3 on either side."""
    torch.manual_seed(0)
    ends = (nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64) for _ in range(2))
    return nn.Sequential(next(ends), *convolved(block(act, sizes)), nn.Tanh(), next(ends)).eval()


def normalised(**options):
    """A block with a BatchNorm behind its first convolution, whose statistics are those of no batch."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(5, dtype=torch.float64, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    first = nn.Conv2d(8, 5, 1, bias=False, dtype=torch.float64)
    return nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(5, 8, 1, dtype=torch.float64)).eval()


# --- the layer ---


@pytest.mark.parametrize(("cls", "kind", "shape"), KINDS, ids=lambda value: getattr(value, "__name__", None))
def test_it_does_at_each_position_what_the_linear_one_does(cls, kind, shape):
    linear = FlexibleLinear(8, 3, bias=False, rank=2, basis="spline", size=5, element="relu", dtype=torch.float64)
    linear.up.weight.requires_grad_(False)
    layer = cls.from_linear(linear.eval())
    x = torch.randn(2, 8, *shape, dtype=torch.float64)
    assert_close(layer(x), linear(x.movedim(1, -1)).movedim(-1, 1))
    assert_close(layer(x[0]), layer(x)[0])
    assert type(layer.down) is kind and layer.up.bias is None and not layer.training
    assert layer.options == linear.options and not layer.up.weight.requires_grad and layer.down.weight.requires_grad
    assert cls.cost(8, 3, 10, rank=2, size=4).macs == 10 * 2 * 11


@pytest.mark.parametrize(("cls", "kind", "shape"), KINDS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fresh_one_keeps_the_scale_of_a_convolution(cls, kind, shape):
    layer = cls(32, 32, bias=False, rank=64)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(500, 32, *shape, generator=torch.Generator().manual_seed(0))
    assert 0.2 < float(layer(x).detach().square().mean()) < 0.5


def test_every_parameter_has_its_gradient():
    layer = FlexibleConv2d(4, 3, rank=2, dtype=torch.float64, basis="legendre", size=3)
    layer(torch.randn(2, 4, 3, 3, dtype=torch.float64)).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in layer.parameters())


# --- blocks ---


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_a_block_of_full_width_is_exact(act):
    model = network(act)
    before = copy.deepcopy(model.state_dict())
    small, plan = decouple(model, "1:3", IMAGES, rank=5, samples=200)
    assert_close(small(IMAGES[0]), model(IMAGES[0]), atol=1e-6, rtol=1e-6)
    assert plan.layers["1:3"].error < 1e-6
    assert type(small[1]) is FlexibleConv2d and [type(m) for m in small[2:4]] == [nn.Identity] * 2
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "kind", "shape"), KINDS[::2], ids=lambda value: getattr(value, "__name__", None))
def test_convolutions_of_every_other_dimension(cls, kind, shape):
    model = convolved(block(), kind).eval()
    data = [torch.randn(30, 8, *shape, generator=torch.Generator().manual_seed(k)).double() for k in range(4)]
    small, _ = decouple(model, "0:2", data, rank=5, samples=160)
    assert type(small[0]) is cls
    assert_close(small(data[0]), model(data[0]), atol=1e-6, rtol=1e-6)
    assert_close(small(data[0][0]), model(data[0][0]), atol=1e-6, rtol=1e-6)


def test_the_samples_are_positions_of_all_images_of_a_batch():
    model = convolved(block()).eval()
    images = torch.arange(4 * 36, dtype=torch.float64).reshape(4, 1, 6, 6).expand(4, 8, 6, 6).contiguous()
    found = read_block(model, "0:2")
    rows = found.rows(images)
    assert rows.shape == (144, 8) and torch.equal(rows[:, 0], torch.arange(144).double())
    assert_close(found.replay(images), model(images))
    assert_close(found.replay(images[0]), model(images[0]))


def test_a_stack_of_convolutions_and_the_predicted_error():
    model = convolved(block("tanh", (8, 12, 12, 4))).eval()
    (alone,) = decouple_errors(model, "0:4", IMAGES, (1,), samples=200)
    small, plan = decouple(model, "0:4", IMAGES, rank=4, samples=200)
    assert plan.layers["0:4"].error < 0.8 * alone.error
    fresh = torch.randn(8, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    values = model(fresh)
    missed = (small(fresh) - values).norm() / (values - values.mean((0, 2, 3), keepdim=True)).norm()
    assert missed.item() == pytest.approx(plan.layers["0:4"].error, rel=0.25)


class Residual(nn.Module):
    """The feed-forward part of a network of convolutions, as names give it, with a residual around it."""

    def __init__(self, inside=False):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = *convolved(block("gelu")[:2]), nn.Dropout(0.2), None
        self.fc2 = convolved(block("gelu")[2:])[0]
        self.inside = inside

    def forward(self, x):
        hidden = self.drop(self.act(self.fc1(x)))
        out = self.fc2(hidden)
        return out + hidden.mean(1, keepdim=True) if self.inside else x + out


def test_the_block_of_a_residual_network():
    model = Residual().eval()
    small, _ = decouple(model, "fc1:fc2", IMAGES, rank=5, samples=200)
    assert_close(small(IMAGES[1]), model(IMAGES[1]), atol=1e-6, rtol=1e-6)
    with pytest.raises(LayerError, match="branch"):
        decouple(Residual(inside=True).eval(), "fc1:fc2", IMAGES, rank=5)


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "plain"])
def test_a_batchnorm_inside_becomes_part_of_the_convolution_before_it(options):
    model = normalised(**options)
    small, plan = decouple(model.train(), "0:3", IMAGES, rank=5, samples=200)
    assert_close(small.eval()(IMAGES[0]), model.eval()(IMAGES[0]), atol=1e-6, rtol=1e-6)
    assert [type(m) for m in small[1:]] == [nn.Identity] * 3
    assert plan.layers["0:3"].dense.params == sum(p.numel() for p in model.parameters())
    assert plan.params == sum(p.numel() for p in small.parameters())


def test_a_batchnorm_behind_a_flexible_layer_can_be_folded():
    layer = FlexibleConv2d(4, 3, rank=2)
    model = nn.Sequential(layer, nn.BatchNorm2d(3)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 4, 5, 5)
    folded = fold_batchnorm(model)
    assert type(folded[1]) is nn.Identity
    assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


# --- plans and files ---


def test_a_plan_saves_loads_reports_and_exports(tmp_path):
    model = network()
    small, plan = decouple(model, "1:3", IMAGES, rank=2, samples=200, size=3)
    assert Plan.from_json(plan.to_json()) == plan
    save(small, plan, tmp_path / "small.safetensors")
    for skeleton in (network(), copy.deepcopy(model).to("meta")):
        assert_close(load(tmp_path / "small.safetensors", skeleton)(IMAGES[0]), small(IMAGES[0]), rtol=0, atol=0)
    told = report(model, small, plan, example=IMAGES[0], latency=False)
    (row,) = [row for row in told.layers if row.name == "1:3"]
    assert row.macs == (36 * 80, 36 * 32) and row.params[1] < row.params[0]
    assert measure(small, example=IMAGES[0]).macs == measure(model, example=IMAGES[0]).macs - 36 * 48
    assert_close(densify(small)(IMAGES[0]), small(IMAGES[0]))
    assert export(small.float(), tmp_path / "small.onnx", example=IMAGES[0].float()).difference < 1e-5


def test_a_plan_trains_from_scratch_and_a_budget_finds_the_rank():
    model = network().float()
    small = apply(model, Plan({"1:3": Choice("flexible", 4)}), init="random")
    assert type(small[1]) is FlexibleConv2d and small[1].rank == 4 and small(IMAGES[0].float()).shape == (4, 8, 6, 6)
    pair = convolved(block(sizes=(12, 20, 12), dtype=torch.float32))
    data = [torch.randn(4, 12, 6, 6, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    _, plan = decouple(pair, "0:2", data, budget=Budget(params=0.3), samples=60, size=3)
    total = sum(p.numel() for p in pair.parameters())
    assert plan.params <= 0.3 * total < plan.params + 12 + 12 + 1 + 5
    with pytest.raises(BudgetError, match="rank 1"):
        decouple(pair, "0:2", data, budget=Budget(params=0.01))


# --- what is refused, with the model left as it was ---


def pair(first=None, between=None, last=None):
    """Return two convolutions of kernel 1 with some of it exchanged."""
    one, act, other = convolved(block())
    return nn.Sequential(first or one, between or act, last or other).double().eval()


REFUSED = [
    (pair(last=nn.Conv2d(5, 8, 1, stride=2)), LayerError, r"'2'.*stride=\(2, 2\)"),
    (pair(first=nn.Conv2d(8, 5, 1, padding=1)), LayerError, r"'0'.*padding=\(1, 1\)"),
    (pair(first=nn.Conv2d(8, 5, 3, padding="same")), LayerError, r"'0'.*kernel_size=\(3, 3\)"),
    (pair(last=nn.Conv2d(5, 10, 1, groups=5)), LayerError, "'2'.*groups=5"),
    (pair(last=nn.ConvTranspose2d(5, 8, 1)), LayerError, "'2'.*transposed"),
    (pair(last=nn.Conv2d(6, 8, 1)), LayerError, "'2'.*takes 6.*gives 5"),
    (pair(last=nn.Linear(5, 8)), LayerError, "Linear"),
    (pair(between=nn.AvgPool2d(1)), LayerError, "'1'.*pointwise"),
    (pair(between=nn.Softmax(1)), LayerError, "'1'.*pointwise"),
    (pair(between=nn.GroupNorm(1, 5)), LayerError, "'1'.*part of it"),
    (nn.Sequential(nn.ReLU(), pair()), LayerError, "begins"),
    (normalised(track_running_stats=False), LayerError, "fold_batchnorm"),
    (nn.Sequential(*pair()[:2], nn.BatchNorm2d(5).double(), pair()[2]).eval(), LayerError, "right behind"),
]


@pytest.mark.parametrize(("model", "kind", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_bad_blocks_are_refused(model, kind, words):
    state = copy.deepcopy(model.state_dict())
    name = f"0:{len(model) - 1}" if type(model[1]) is not nn.Sequential else "0:1.2"
    with pytest.raises(kind, match=words):
        decouple(model, name, IMAGES, rank=2)
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_padding_by_name_pads_nothing_where_the_kernel_is_one():
    assert pointwise_twin(nn.Conv1d(4, 3, 1, padding="same")).weight.shape == (3, 4)


def test_a_plan_for_another_kind_of_block_is_refused():
    with pytest.raises(PlanError, match="stride"):
        apply(pair(last=nn.Conv2d(5, 8, 1, stride=2)), Plan({"0:2": Choice("flexible", 2)}), init="random")
    mixed = nn.Sequential(nn.Conv2d(8, 5, 1), ACTS["relu"](), nn.Flatten(), nn.Linear(5, 8))
    with pytest.raises(PlanError, match="no layer stands"):
        apply(mixed, Plan({"0:3": Choice("flexible", 2)}), init="random")
