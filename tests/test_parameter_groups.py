"""Does every parameter get its learning rate, once, and does a step then move the output alike at every rank?"""

import math

import pytest
import torch
from cases import FORMS, example_of, form_name, small_rank
from cases_models import CalledTwice, Tied, convnet, mlp
from torch import nn

import rankfold as rf
from rankfold import layers
from rankfold.layers import fan_ins
from rankfold.train import parameter_groups

CHAINS = [form for form in FORMS if form[0].method != "svd_form"]  # orthonormal: no fan-in is behind its size


def built(layer, options):
    dense, x = example_of(layer.dense_type)
    return layer.like(dense, rank=small_rank(layer, dense, options), **options), dense, x


def flat(groups):
    return [(id(p), group) for group in groups for p in group["params"]]


def mixed():
    table = layers.LowRankEmbedding(50, 32, rank=4)
    return nn.ModuleDict(
        {
            "table": table,
            "head": table.tied_head(bias=True),
            "body": rf.apply(
                convnet(), rf.Plan({"3": rf.Choice("tucker", rank=(8, 8)), "8": rf.Choice("tt", rank=4)}), init="random"
            ),
            "norm": nn.LayerNorm((4, 4)),
        }
    )


MODELS = {"dense": lambda: mlp(8, 8, 8), "called twice": CalledTwice, "tied": Tied, "mixed": mixed}


@pytest.mark.parametrize("decay", [None, 0.0, 0.1])
@pytest.mark.parametrize("case", MODELS)
def test_every_parameter_is_in_one_group_once(case, decay):
    model = MODELS[case]()
    model_ids = {id(p) for p in model.parameters()}
    found = flat(parameter_groups(model, lr=0.1, weight_decay=decay))
    assert len(found) == len(model_ids)
    assert {key for key, _ in found} == model_ids
    assert all(group["lr"] == 0.1 * group["multiplier"] for _, group in found)


@pytest.mark.parametrize(("layer", "options"), CHAINS, ids=map(form_name, CHAINS))
def test_multipliers_are_dense_fan_in_over_own_fan_in_and_cores(layer, options):
    module, dense, _ = built(layer, options)
    found = fan_ins(module)
    assert found.dense == (1 if isinstance(dense, nn.Embedding) else dense.weight[0].numel())
    weights = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    assert [id(p) for p, _ in found.factors] == [id(p) for p in weights]
    groups = dict(flat(parameter_groups(module, lr=1.0)))
    for parameter, fan_in in found.factors:
        assert groups[id(parameter)]["lr"] == pytest.approx(found.dense / fan_in / len(weights))
    if getattr(module, "bias", None) is not None:
        assert groups[id(module.bias)]["lr"] == 1.0


FAN_INS = [
    (layers.LowRankLinear(12, 10, rank=3), 12, [12, 3]),
    (layers.LowRankEmbedding(30, 12, rank=3), 1, [1, 3]),
    (layers.CPConv2d(8, 6, 3, groups=2, rank=2), 36, [4, 9, 2]),
    (layers.CPConv2d(8, 6, (3, 5), rank=2, separable=True), 120, [8, 3, 5, 2]),
    (layers.TuckerConv2d(8, 6, 3, rank=(4, 5)), 72, [8, 45, 4]),
    (layers.LowRankConv2d(8, 6, 3, rank=4, split="spatial"), 72, [24, 12]),
    (layers.TTLinear(12, 6, rank=2, in_shape=(3, 4), out_shape=(2, 3)), 12, [6, 4]),
    (layers.TTConv2d(6, 4, 3, rank=2, in_shape=(2, 3), out_shape=(2, 2)), 54, [18, 4, 3]),
    (layers.TTEmbedding(12, 6, rank=2, in_shape=(3, 4), out_shape=(2, 3)), 1, [2, 1]),
]


@pytest.mark.parametrize(("layer", "dense", "factors"), FAN_INS, ids=lambda v: str(v)[:20])
def test_fan_ins_are_the_values_added_up(layer, dense, factors):
    found = fan_ins(layer)
    assert (found.dense, [fan_in for _, fan_in in found.factors]) == (dense, factors)


def test_a_dense_layer_has_no_fan_ins_of_factors():
    with pytest.raises(rf.RankfoldError, match="Linear is no factorised layer"):
        fan_ins(nn.Linear(2, 2))


@pytest.mark.parametrize("everything", [False, True])
def test_biases_and_norms_decay_only_when_told(everything):
    model = mixed()
    groups = dict(flat(parameter_groups(model, lr=1.0, weight_decay=0.1, decay_all=everything)))
    plain = [
        model["norm"].weight,
        model["norm"].bias,
        model["body"][1].weight,
        model["body"][8].bias,
        model["head"].bias,
    ]
    for parameter in plain:
        assert groups[id(parameter)]["weight_decay"] == (0.1 if everything else 0.0)
    for parameter in (model["body"][8].cores[0], model["body"][3].core.weight, model["body"][0].weight):
        assert groups[id(parameter)]["weight_decay"] == 0.1
    assert all("weight_decay" not in group for group in parameter_groups(model, lr=1.0))


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop], ids=lambda kind: kind.__name__
)
def test_optimisers_take_the_groups(optimizer):
    model = mlp(8, 8, 8)
    taken = optimizer(parameter_groups(model, lr=0.1, weight_decay=0.01))
    assert sum(len(group["params"]) for group in taken.param_groups) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0"),
        ({"lr": math.nan}, "lr must be a number >= 0"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay must be a number >= 0"),
        ({"lr": 1.0, "decay_all": True}, "give weight_decay too"),
    ],
)
def test_unusable_settings_are_refused(arguments, said):
    with pytest.raises(rf.RankfoldError, match=said):
        parameter_groups(nn.Linear(2, 2), **arguments)


def test_layers_in_svd_form_keep_the_rate():
    form = layers.SVDLinear(12, 10, rank=3)
    assert [group["multiplier"] for group in parameter_groups(form, lr=1.0)] == [1.0]


def test_a_lazy_parameter_is_refused():
    with pytest.raises(rf.RankfoldError, match="lazy"):
        parameter_groups(nn.LazyLinear(2), lr=1.0)


# --- one step of Adam


def step_size(layer, x, groups, lr=1e-5):
    """The root mean square by which one step of Adam moves the output."""
    optimizer = torch.optim.Adam(groups, lr=lr)
    before = layer(x)
    (before * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    optimizer.step()
    return float((layer(x) - before).detach().square().mean().sqrt())


RANKS = (1, 4, 16, 64)
SWEEPS = {
    "svd": (nn.Linear, lambda width, rank: layers.LowRankLinear(width, width, False, rank=rank)),
    "tt": (nn.Linear, lambda width, rank: layers.TTLinear(width, width, False, rank=rank)),
    "tucker": (nn.Conv2d, lambda width, rank: layers.TuckerConv2d(width, width, 3, rank=(rank, rank), bias=False)),
    "cp": (nn.Conv2d, lambda width, rank: layers.CPConv2d(width, width, 3, rank=rank, bias=False)),
}


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("case", SWEEPS)
def test_one_step_moves_the_output_alike_at_every_rank(case, width):
    kind, make = SWEEPS[case]
    x = torch.randn(8, width) if kind is nn.Linear else torch.randn(2, width, 4, 4)
    dense = kind(width, width, bias=False) if kind is nn.Linear else kind(width, width, 3, bias=False)
    expected = step_size(dense, x, [{"params": list(dense.parameters())}])
    made = [make(width, rank) for rank in RANKS]
    moved = [step_size(layer, x, parameter_groups(layer, lr=1e-5)) / expected for layer in made]
    assert max(moved) < 4 * min(moved), moved
    assert 0.2 < min(moved), moved
    assert max(moved) < 5, moved


def test_one_rate_for_all_cores_does_not():
    x = torch.randn(8, 256)
    plain = [
        step_size(make, x, [{"params": list(make.parameters())}]) for make in (SWEEPS["tt"][1](256, r) for r in RANKS)
    ]
    assert max(plain) > 10 * min(plain)
