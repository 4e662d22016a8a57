"""Does `measure` count what torch counts, see every call, and leave the model as it was?"""

import pytest
import torch
from cases_models import Attention, CalledTwice, Tied, WithDict, convnet, encoder, mlp, same_state, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from rankfold.stats import Stats

IMAGES = torch.randn(4, 3, 8, 8)


def test_counts_are_those_of_torch():
    model = convnet().eval()
    counter = FlopCounterMode(display=False)
    with counter:
        model(IMAGES)
    stats = rf.measure(model, example=IMAGES)
    assert stats.macs * 4 * 2 == counter.get_total_flops()
    assert stats.macs == sum(layer.macs for layer in stats.layers.values())
    assert stats.params == sum(parameter.numel() for parameter in model.parameters())
    assert stats.batch_size == 4


def test_macs_are_per_sample():
    model = convnet()
    assert rf.measure(model, example=IMAGES).macs == rf.measure(model, example=IMAGES[:1]).macs


def test_layers_have_kind_params_macs_and_shapes():
    layer = rf.measure(convnet(), example=IMAGES).layers["3"]
    assert layer.kind == "Conv2d"
    assert layer.params == 32 * 16 * 9 + 32
    assert layer.macs == 16 * 32 * 16 * 9
    assert [(call.input, call.output) for call in layer.calls] == [((4, 16, 8, 8), (4, 32, 4, 4))]


def test_a_layer_called_twice_is_one_layer_with_two_calls():
    stats = rf.measure(CalledTwice(), example=torch.ones(2, 32))
    assert list(stats.layers) == ["body", "head"]
    assert len(stats.layers["body"].calls) == 2
    assert stats.macs == 2 * 32 * 32 + 32 * 4


def test_a_layer_that_is_not_called_has_no_calls():
    example = {"x": torch.ones(3, 24), "scale": 2.0}
    stats = rf.measure(WithDict(), example=example)
    assert stats.layers["unused"].calls == ()
    assert stats.layers["unused"].macs == 0
    assert stats.layers["first"].macs == 24 * 24
    assert stats.batch_size == 3


def test_model_is_left_as_it_was():
    model = convnet()
    model[1].eval()
    model[1].momentum = None
    flags = [module.training for module in model.modules()]
    before, random = state(model), torch.get_rng_state()
    rf.measure(model, DataLoader(TensorDataset(IMAGES), batch_size=2, shuffle=True))
    same_state(model, before)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_is_left_as_it_was_after_an_error():
    model = convnet()
    before = state(model)
    with pytest.raises(RuntimeError):
        rf.measure(model, example=torch.ones(1, 7, 8, 8))
    same_state(model, before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


class Counting(nn.Module):
    """A model that changes a buffer even in eval mode, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.fc(x + torch.rand(()))


def test_buffers_and_random_state_are_restored():
    model, random = Counting(), torch.get_rng_state()
    rf.measure(model, example=torch.ones(1, 4))
    assert model.count == 0
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        ([torch.ones(2, 8)], 2),
        ([(torch.ones(3, 8), torch.zeros(3))], 3),
        ([{"input": torch.ones(5, 8)}], 5),
        (iter([torch.ones(6, 8), torch.ones(1, 8)]), 6),
    ],
    ids=["tensor", "pair", "dict", "iterator"],
)
def test_any_loader(loader, expected):
    assert rf.measure(nn.Linear(8, 4), loader).batch_size == expected


@pytest.mark.parametrize("given", [{}, {"loader": [torch.ones(1, 8)], "example": torch.ones(1, 8)}, {"loader": []}])
def test_no_data_or_too_much_is_refused(given):
    with pytest.raises(rf.RankfoldError, match="loader"):
        rf.measure(nn.Linear(8, 4), **given)


def test_a_lazy_layer_is_refused_and_stays_lazy():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(rf.RankfoldError, match=r"'0\.weight'"):
        rf.measure(model, example=torch.ones(1, 8))
    assert isinstance(model[0], nn.LazyLinear)


def test_json_there_and_back():
    stats = rf.measure(convnet(), example=IMAGES)
    assert Stats.from_json(stats.to_json()) == stats


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rankfold_stats": 2}', '{"rankfold_stats": 1, "layers": {"a": 1}}'])
def test_bad_json_is_refused(text):
    with pytest.raises(rf.RankfoldError):
        Stats.from_json(text)


def test_a_compressed_model_is_measured_again():
    model = convnet()
    small, plan = rf.compress(model, example=IMAGES, budget=rf.Budget(macs=0.5))
    stats = rf.measure(small, example=IMAGES)
    assert (stats.params, stats.macs) == (plan.params, plan.macs)
    for name, choice in plan.layers.items():
        assert (stats.layers[name].params, stats.layers[name].macs) == (choice.params, choice.macs), name


def test_the_fused_transformer_path_hides_no_layer():
    stats = rf.measure(encoder(), example=torch.ones(2, 5, 32))
    assert len(stats.layers["layers.0.linear1"].calls) == 1
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_is_named_and_its_inside_is_not():
    stats = rf.measure(Attention(), example=torch.ones(2, 5, 32))
    assert list(stats.layers) == ["attend", "head"]


def test_tied_weights_count_once():
    assert rf.measure(Tied(), example=torch.zeros(1, 3, dtype=torch.long)).params == 50 * 32 + 32 * 32 + 32


def test_a_model_that_is_a_layer():
    stats = rf.measure(mlp(8, 4)[0], example=torch.ones(1, 8))
    assert list(stats.layers) == [""]
