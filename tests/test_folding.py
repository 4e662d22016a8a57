"""Is BatchNorm folded wherever it can be, and nowhere else, without changing what the model computes?"""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import LayerError
from rankfold.layers import CPConv2d, LowRankConv1d, LowRankConv2d, LowRankLinear, TuckerConv2d, TuckerConv3d
from rankfold.surgery import fold_batchnorm


def trained(model):
    """Give every BatchNorm statistics and parameters as after training."""
    source = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(generator=source)
            module.running_var.uniform_(0.2, 3, generator=source)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, generator=source)
            nn.init.normal_(module.bias, generator=source)
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


LAYERS = {
    "conv2d": (nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "no bias": (nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "groups": (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "reflect": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "not affine": (nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, affine=False), (2, 6, 7, 7)),
    "conv1d": (nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), (2, 6, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 6, 5, 5)),
    "linear": (nn.Linear(12, 8), nn.BatchNorm1d(8), (5, 12)),
    "linear without bias": (nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), (5, 12)),
    "sync": (nn.Conv2d(6, 8, 3), nn.SyncBatchNorm(8), (2, 6, 7, 7)),
    "svd": (LowRankConv2d(6, 8, 3, bias=False, rank=3), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "svd, spatial": (LowRankConv2d(6, 8, 3, rank=3, split="spatial"), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "svd, groups": (LowRankConv2d(6, 8, 3, groups=2, bias=False, rank=2), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "svd, 1-D": (LowRankConv1d(6, 8, 3, rank=3), nn.BatchNorm1d(8), (2, 6, 9)),
    "tucker": (TuckerConv2d(6, 8, 3, bias=False, rank=(3, 4)), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "tucker, 3-D": (TuckerConv3d(4, 6, 3, rank=(3, 2)), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "cp": (CPConv2d(6, 8, 3, bias=False, rank=5), nn.BatchNorm2d(8), (2, 6, 7, 7)),
    "svd, linear": (LowRankLinear(12, 8, bias=False, rank=3), nn.BatchNorm1d(8), (5, 12)),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_function_stays_the_same(case, dtype):
    layer, norm, shape = LAYERS[case]
    model = trained(nn.Sequential(layer, norm, nn.ReLU())).to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded, x = fold_batchnorm(model), torch.randn(shape, dtype=dtype)
    assert type(folded[1]) is nn.Identity
    assert type(folded[0]) is type(layer)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(folded[0].weight, layer.weight)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Residual(nn.Module):
    """A block as ResNets have it, with a convolution whose output is used twice."""

    def __init__(self, branch=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.branch = branch

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        z = self.conv2(y)
        normal = self.bn2(z)
        return normal + z if self.branch else normal + x


class Untraceable(Residual):
    """The same with a branch on values, which no tracer follows."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("kind", [Residual, Untraceable])
@pytest.mark.parametrize(("branch", "left"), [(False, []), (True, ["bn2"])])
def test_an_output_that_is_used_elsewhere_keeps_its_norm(kind, branch, left):
    model, x = trained(kind(branch)), torch.randn(2, 4, 6, 6)
    folded = fold_batchnorm(model, example=x)
    assert norms(folded) == left
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class Forgetful(Untraceable):
    """The same after many tensors that are used and gone, so that new ones take over their ids."""

    def forward(self, x):
        gone = [x + k for k in range(100)]
        assert all(one.isfinite().all() for one in gone)
        del gone
        return super().forward(x)


def test_tensors_that_are_gone_are_not_taken_for_others():
    for _ in range(5):  # whether an id is given out again is a matter of chance
        folded = fold_batchnorm(trained(Forgetful()), example=torch.randn(2, 4, 6, 6))
        assert norms(folded) == []


def test_what_cannot_be_traced_needs_an_example():
    with pytest.raises(LayerError, match="pass example="):
        fold_batchnorm(trained(Untraceable()))


class Returned(nn.Module):
    """Returns what the convolution gave, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y if x.sum() > -1e9 else None


class ReadWeight(nn.Module):
    """Uses the weight of the convolution by itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.norm()


class Twice(nn.Module):
    """Calls one convolution twice, and one norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


def _tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    return model


def _hooked(index):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[index].register_forward_hook(lambda *_: None)
    return model


def _parametrised():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.utils.parametrizations.orthogonal(model[0])
    return model


class Mine(nn.BatchNorm2d):
    """A user's own norm."""


LEFT = {
    "returned": Returned(),
    "weight read": ReadWeight(),
    "called twice": Twice(),
    "tied": _tied(),
    "hooked layer": _hooked(0),
    "hooked norm": _hooked(1),
    "parametrised": _parametrised(),
    "subclass": nn.Sequential(nn.Conv2d(4, 4, 1), Mine(4)),
    "something between": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
    "norm first": nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_folded_is_left(case):
    model, x = trained(LEFT[case]), torch.randn(2, 4, 6, 6)
    folded = fold_batchnorm(model, example=x)
    assert norms(folded) == norms(model)
    torch.testing.assert_close(folded(x), model(x))


def test_a_norm_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(LayerError, match="'1' has no running statistics"):
        fold_batchnorm(model)


def test_a_difference_on_the_example_is_told():
    class Square(nn.Module):
        """A linear layer on (batch, tokens, features), as many tokens as features: the norm is over tokens."""

        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.linear(x))

    with pytest.raises(LayerError, match="differs from Square"):
        fold_batchnorm(trained(Square()), example=torch.randn(3, 5, 5))


def test_the_result_is_in_eval_mode_and_the_model_is_not_changed():
    model = trained(Residual()).train()
    folded, x = fold_batchnorm(model), torch.randn(2, 4, 6, 6)
    assert not any(module.training for module in folded.modules())
    assert all(module.training for module in model.modules())
    assert norms(model) == ["bn1", "bn2"]
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_compressed_model_is_folded_saved_and_loaded(tmp_path):
    x = torch.randn(2, 4, 6, 6)
    small, plan = rf.compress(trained(Residual()), example=x, budget=rf.Budget(params=0.7))
    folded = fold_batchnorm(small)
    assert norms(folded) == []
    torch.testing.assert_close(folded(x), small(x), rtol=1e-4, atol=1e-5)
    rf.save(folded, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", fold_batchnorm(trained(Residual())))
    torch.testing.assert_close(loaded(x), folded(x), rtol=0, atol=0)


def test_a_skeleton_without_values_can_be_folded():
    with torch.device("meta"):
        model = Residual().eval()
    folded = fold_batchnorm(model)
    assert norms(folded) == []
    assert folded.conv1.bias.is_meta


@pytest.mark.slow
def test_a_folded_model_exports(tmp_path):
    x = torch.randn(2, 4, 6, 6)
    small, _ = rf.compress(fold_batchnorm(trained(Residual())), example=x, budget=rf.Budget(params=0.7))
    rf.export(small, tmp_path / "small.onnx", example=x)
