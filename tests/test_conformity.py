"""Does every layer pass the checks that a user's own class is given, and do these checks see what is broken?"""

import pytest
import torch
from cases import AXES, FORM_IDS, FORMS, example_of
from cases_broken import BROKEN, Boasts, RowByRow
from cases_own import PairEmbedding, PairLinear
from torch import nn

from rankfold.errors import LayerError
from rankfold.testing import CHECKS, Case, check_layer

# tensor trains and their kin merge cores once a call, in an order planned for the batch: see test_tt_layers.py
# layers in SVD form rebuild their weight where that is cheaper: see test_svd_training.py
PLANNED = ("tt", "kronecker", "ring", "svd_form")
EXACT = ("svd", "svd_form", "pair")  # the others promise bounds, or what a start reaches: see test_layer_errors.py
OWN = [(PairLinear, {}), (PairEmbedding, {})]


def case_of(layer, options, check):
    few = check == "metric" and layer.dense_type in AXES  # a decomposition in a metric is many
    small = {"in_channels": 4, "out_channels": 6} if few else {}
    dense, x = example_of(layer.dense_type, **small)
    exact = layer.method in EXACT and options.get("split") != "spatial"
    return Case(dense, x, options=options, exact_errors=exact)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("layer", "options"), [*FORMS, *OWN], ids=[*FORM_IDS, "PairLinear", "PairEmbedding"])
def test_every_layer_keeps_its_promises(layer, options, check):
    if check == "macs" and layer.method in PLANNED:
        pytest.skip("counted for a plan of its own")
    CHECKS[check](layer, case_of(layer, options, check))


def simple():
    return Case(nn.Linear(12, 10), torch.randn(2, 3, 12), rank=3)


def test_every_check_is_seen_to_fail():
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize(
    ("check", "broken"),
    [pytest.param(check, broken, id=f"{check}-{broken.__name__}") for check in BROKEN for broken in BROKEN[check]],
)
def test_a_broken_promise_is_seen(check, broken):
    with pytest.raises((AssertionError, RuntimeError), match=BROKEN[check][broken]):
        CHECKS[check](broken, simple())
    CHECKS[check](PairLinear, simple())


def test_all_that_is_wrong_is_told_at_once():
    cases = [simple(), Case(nn.Linear(12, 10, bias=False), torch.randn(4, 12), rank=2)]
    with pytest.raises(AssertionError) as error:
        check_layer(Boasts, cases)
    lines = str(error.value).splitlines()
    assert lines[0] == "Boasts does not keep 4 of its promises:"
    told = ["errors, Case(Linear(in_features=12, out_features=10, bias=True), rank=3): errors promises 0."]
    assert [line for line in lines if line.startswith("errors, ")][0].startswith(told[0])
    assert sum(line.startswith("metric, ") for line in lines) == 2
    check_layer(Boasts, cases, without=("errors", "metric"))


def test_what_a_class_raises_is_told_with_its_name():
    with pytest.raises(AssertionError, match=r"empty_batch, Case\(.*\): RuntimeError: .*non-empty"):
        check_layer(RowByRow, [simple()], without=set(CHECKS) - {"empty_batch"})


@pytest.mark.parametrize(
    ("cases", "without", "message"), [([], (), "without a case"), ([1], ("speed",), "without='speed' is no check")]
)
def test_checks_of_nothing_are_refused(cases, without, message):
    with pytest.raises(LayerError, match=message):
        check_layer(PairLinear, cases, without=without)


def test_a_case_is_not_changed():
    case = simple()
    before, grad = case.dense.state_dict(), case.example.clone()
    before = {name: value.clone() for name, value in before.items()}
    check_layer(PairLinear, [case])
    torch.testing.assert_close(case.dense.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(case.example, grad, rtol=0, atol=0)
    assert all(p.grad is None for p in case.dense.parameters())
    assert case.dense.training
