"""Are multiply-adds those that a model does, whatever the kernel that does them?"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankfold as rf
from rankfold.stats import Stats
from rankfold.stats._macs import FORMULAS

B, L, D, WIDE = 2, 5, 16, 32
ATTENTION = L * D * 4 * D + 2 * L * L * D  # of one sample: four projections, scores and weighted values


class Called(nn.Module):
    """A function as a model; a parameter makes it one with a device."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, *args):
        return self.function(*args)


def gates(kind, *sizes, **options):
    return lambda: kind(*sizes, batch_first=True, **options)


MODELS = {  # what makes a model, its example, and the multiply-adds of one sample, counted by hand
    "attention": (
        lambda: nn.TransformerEncoderLayer(D, 4, WIDE, batch_first=True),
        (torch.randn(B, L, D),),
        ATTENTION + 2 * L * D * WIDE,
    ),
    "lstm": (gates(nn.LSTM, 10, 20), (torch.randn(B, 7, 10),), 7 * 4 * 20 * 30),
    "lstm, two layers, both directions": (
        gates(nn.LSTM, 10, 20, num_layers=2, bidirectional=True),
        (torch.randn(B, 7, 10),),
        2 * 7 * 4 * 20 * (10 + 20) + 2 * 7 * 4 * 20 * (40 + 20),
    ),
    "lstm, projected": (
        gates(nn.LSTM, 10, 20, proj_size=6),
        (torch.randn(B, 7, 10),),
        7 * (4 * 20 * (10 + 6) + 20 * 6),
    ),
    "lstm without biases": (gates(nn.LSTM, 10, 20, bias=False), (torch.randn(B, 7, 10),), 7 * 4 * 20 * 30),
    "gru": (gates(nn.GRU, 10, 20), (torch.randn(B, 7, 10),), 7 * 3 * 20 * 30),
    "rnn": (gates(nn.RNN, 10, 20), (torch.randn(B, 7, 10),), 7 * 20 * 30),
    "bilinear": (lambda: nn.Bilinear(5, 6, 7), (torch.randn(B, 5), torch.randn(B, 6)), 7 * (5 * 6 + 6)),
    "matrix and vector": (
        lambda: Called(lambda x: torch.stack([torch.ones(9, 8) @ row for row in x])),
        (torch.randn(B, 8),),
        72,
    ),
    "dot": (lambda: Called(lambda x: torch.stack([row @ row for row in x])), (torch.randn(B, 8),), 8),
    "attention of fewer keys": (
        lambda: Called(F.scaled_dot_product_attention),
        (torch.randn(B, 4, L, 8), torch.randn(B, 4, 3, 8), torch.randn(B, 4, 3, 12)),
        4 * L * 3 * (8 + 12),
    ),
    "einsum": (
        lambda: Called(lambda x: torch.einsum("bij,jk->bik", x, torch.ones(6, 7))),
        (torch.randn(B, 3, 6),),
        3 * 6 * 7,
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", MODELS)
def test_the_count_is_that_by_hand(case):
    make, example, macs = MODELS[case]
    stats = rf.measure(make(), example=example)
    assert (stats.macs, stats.uncounted) == (macs, ())


@pytest.mark.parametrize("name", ["attention", "attention of fewer keys"])
def test_the_count_does_not_depend_on_the_kernel(name):
    make, example, macs = MODELS[name]
    for backend in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        if name == "attention of fewer keys" and backend is not torch.nn.attention.SDPBackend.MATH:
            continue  # values wider than keys are for the plain kernel alone
        with torch.nn.attention.sdpa_kernel([backend]):
            assert rf.measure(make(), example=example).macs == macs


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped products")
def test_grouped_products_count_each_row_once():
    rows, weights = torch.randn(16, 32), torch.randn(2, 32, 64)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    assert FORMULAS["_grouped_mm"](rows, weights, ends) == 16 * 32 * 64
    assert FORMULAS["_grouped_mm"](torch.randn(2, 5, 32), weights) == 2 * 5 * 32 * 64


@torch.library.custom_op("rankfold_tests::my_matmul", mutates_args=())
def my_matmul(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


def test_what_no_formula_gives_is_said():
    with pytest.warns(UserWarning, match="my_matmul"):
        stats = rf.measure(Called(my_matmul), example=torch.randn(B, 3))
    assert stats.uncounted == ("my_matmul",)
    assert "my_matmul" in str(stats)
    assert Stats.from_json(stats.to_json()) == stats


VIEWS = {
    "as it is": lambda p: p,
    "unsqueezed": lambda p: p.unsqueeze(0),
    "expanded": lambda p: p.expand(2, 4, 64),
    "sliced": lambda p: p[1:3],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_parameter_may_be_handed_to_a_layer(view):
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(4, 64))
            self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.other(x).mean() + self.one(VIEWS[view](self.queries))

    small, plan = rf.compress(Queries(), example=torch.randn(2, 4, 64), budget=rf.Budget(macs=0.6))
    assert plan.macs <= 0.6 * plan.dense.macs


PUBLISHED = ("resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t", "efficientnet_b0", "convnext_tiny")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_is_that_which_torchvision_publishes(name):
    models = pytest.importorskip("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        model = models.get_model(name, weights=None).eval()
        example = torch.empty(1, 3, *[weights.transforms().crop_size[0]] * 2)
    assert rf.measure(model, example=example).macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=6e-4)


@pytest.mark.filterwarnings("ignore")  # of torch, on its own quantisation
def test_quantised_layers_are_counted():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    assert (
        rf.measure(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), example=torch.randn(3, 8)).macs
        == 8 * 12 + 12 * 4
    )
