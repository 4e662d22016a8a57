"""Are BatchNorm statistics estimated anew, and is nothing else changed?"""

import math

import pytest
import torch
from cases_train import accuracy, assert_same, data, loader, network, tensors
from torch import nn
from torch.testing import assert_close

from rankfold.errors import DataError, RankfoldError
from rankfold.train import Recipe, fit, reestimate_batchnorm


def test_batchnorm_statistics_are_the_average_over_batches():
    model = network(dropout=0.9).train()
    model[3].eval()
    model[1].momentum = 0.37
    batches = list(data(60)[0].split(20))
    with torch.no_grad():
        inputs = torch.stack([model[0](x) for x in batches])
    before = tensors(model)
    state = torch.get_rng_state()
    reestimate_batchnorm(model, [*batches, torch.full((20, 6), 1e6)], batches=3)
    assert_close(model[1].running_mean, inputs.mean(1).mean(0))
    assert_close(model[1].running_var, inputs.var(1).mean(0))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert model[1].momentum == 0.37
    assert [module.training for module in model.modules()] == [True, True, True, True, False, True]
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_reestimation_recovers_a_rescaled_network():
    model = network(dropout=0.0).eval()
    x, y = data(200)
    fit(model, [(x, y)] * 20, epochs=3, lr=0.02)
    wanted = accuracy(model)
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[0].bias.mul_(5).add_(3)
    assert accuracy(model) < wanted - 0.1
    reestimate_batchnorm(model, [(x, y)])
    assert accuracy(model) > wanted - 0.03


def test_fit_reestimates_before_the_first_step():
    model, seen = network(), []
    model.register_forward_hook(lambda *_: seen.append(model.training))
    fit(model, loader(), recipe=Recipe(batchnorm=2))
    assert seen == [False, False, True, True, True]


class Failing:
    def __iter__(self):
        yield data()[0]
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "error", "problem"),
    [
        ([], DataError, "no batch"),
        ([data()[0], data()[0] * math.nan], DataError, "NaN or Inf"),
        (Failing(), KeyboardInterrupt, None),
        ([data()[0], data()[0][:1]], ValueError, "more than 1 value"),
        ([3], DataError, "a batch must be"),
    ],
    ids=["empty", "nan", "interrupted", "one row", "no batch"],
)
def test_failed_reestimation_changes_nothing(batches, error, problem):
    model = network()
    before = tensors(model)
    with pytest.raises(error, match=problem):
        reestimate_batchnorm(model, batches)
    assert_same(model, before)
    assert model[1].momentum == 0.1 and all(module.training for module in model.modules())


def test_a_model_without_batchnorm_needs_no_data():
    reestimate_batchnorm(nn.Linear(3, 3), Failing())
    model = nn.BatchNorm1d(3, track_running_stats=False)
    reestimate_batchnorm(model, Failing())
    with pytest.raises(RankfoldError, match="batches"):
        reestimate_batchnorm(network(), loader(), batches=0)
