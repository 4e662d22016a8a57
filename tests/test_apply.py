"""Does `apply` build exactly what the plan says, and leave the model it was given alone?"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases_models import Attention, CalledTwice, Tied, convnet, encoder, mlp, params, same_state, state
from torch import nn

import rankfold as rf
from rankfold.errors import PlanError
from rankfold.layers import LowRankConv2d, LowRankLinear, TuckerConv2d, is_factorised

IMAGES = torch.randn(2, 3, 8, 8)
PLAN = rf.Plan(
    {
        "0": rf.Choice("svd", rank=5, options={"split": "spatial"}),
        "3": rf.Choice("tucker", rank=(8, 6)),
        "8": rf.Choice("svd", rank=7),
        "10": rf.Choice("dense"),
    }
)


def test_layers_are_what_the_plan_says():
    small = rf.apply(convnet(), PLAN)
    assert isinstance(small[0], LowRankConv2d)
    assert (small[0].rank, dict(small[0].options)) == (5, {"split": "spatial"})
    assert isinstance(small[3], TuckerConv2d)
    assert small[3].rank == (8, 6)
    assert isinstance(small[8], LowRankLinear)
    assert type(small[10]) is nn.Linear
    assert small(IMAGES).shape == (2, 5)


@pytest.mark.parametrize("init", ["decompose", "random"])
def test_the_model_is_untouched_and_shares_nothing(init):
    model = convnet()
    before, random = state(model), torch.get_rng_state()
    small = rf.apply(model, PLAN, init=init)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()
    same_state(model, before)
    assert not any(is_factorised(module) for module in model.modules())


def test_full_rank_computes_the_same():
    model = convnet().double().eval()
    plan = rf.Plan({"3": rf.Choice("tucker", rank=(32, 16)), "8": rf.Choice("svd", rank=40)})
    torch.testing.assert_close(rf.apply(model, plan)(IMAGES.double()), model(IMAGES.double()), rtol=1e-10, atol=1e-10)


def test_mode_dtype_and_requires_grad_are_kept():
    model = convnet().double().eval()
    model[3].train().weight.requires_grad_(False)
    for init in ("decompose", "random"):
        small = rf.apply(model, PLAN, init=init)
        assert [m.training for m in (small, small[0], small[3], small[8])] == [False, False, True, False]
        assert {tensor.dtype for tensor in small.parameters()} == {torch.float64}
        assert not any(p.requires_grad for name, p in small[3].named_parameters() if "bias" not in name)


def test_random_layers_differ_by_layer_and_by_seed_alone():
    model = mlp(16, 16, 16)
    plan = rf.Plan({"0": rf.Choice("svd", rank=4), "1": rf.Choice("svd", rank=4)})
    first, again, other = (rf.apply(model, plan, init="random", seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert not torch.equal(first[0].weight, first[1].weight)


def test_random_needs_shapes_only():
    with torch.device("meta"):
        skeleton = convnet()
    small = rf.apply(skeleton, PLAN, init="random")
    assert all(parameter.is_meta for parameter in small.parameters())
    assert params(small) == params(rf.apply(convnet(), PLAN))
    with pytest.raises(PlanError, match="meta"):
        rf.apply(skeleton, PLAN)


def test_a_model_that_is_the_layer():
    model = nn.Linear(16, 16)
    small, plan = rf.compress(model, example=torch.ones(1, 16), budget=rf.Budget(params=0.6))
    assert isinstance(small, LowRankLinear)
    assert list(plan.layers) == [""]
    assert "(model)" in str(plan)
    assert type(rf.densify(small)) is nn.Linear


def test_layers_in_lists_and_dicts():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(16, 16), nn.ReLU()]), "b": nn.Linear(16, 16)})
    small = rf.apply(model, rf.Plan({"a.0": rf.Choice("svd", rank=2), "b": rf.Choice("svd", rank=3)}))
    assert (small["a"][0].rank, small["b"].rank) == (2, 3)
    assert list(small) == ["a", "b"]


def test_a_shared_module_stays_shared():
    small = rf.apply(CalledTwice(), rf.Plan({"body": rf.Choice("svd", rank=4)}))
    assert small.body is small.again
    assert is_factorised(small.body)


def test_references_beside_the_module_tree_follow():
    model = mlp(16, 16, 16)
    model.shortcuts = [model[0], model[1]]
    small = rf.apply(model, rf.Plan({"0": rf.Choice("svd", rank=4)}))
    assert small.shortcuts[0] is small[0]
    assert small.shortcuts[1] is small[1]


def test_tied_weights_stay_tied():
    small = rf.apply(Tied(), rf.Plan({"body": rf.Choice("svd", rank=4)}))
    assert small.head.weight is small.embed.weight


def test_executor_gives_the_same():
    model = convnet()
    with ThreadPoolExecutor(2) as executor:
        parallel = rf.apply(model, PLAN, executor=executor)
    torch.testing.assert_close(parallel.state_dict(), rf.apply(model, PLAN).state_dict(), rtol=0, atol=0)


def test_densify_gives_back_stock_layers():
    small = rf.apply(convnet(), PLAN).eval()
    before = state(small)
    dense = rf.densify(small)
    assert not any(is_factorised(module) for module in dense.modules())
    assert [type(layer) for layer in dense] == [type(layer) for layer in convnet()]
    assert not any(module.training for module in dense.modules())
    torch.testing.assert_close(dense(IMAGES), small(IMAGES), rtol=1e-4, atol=1e-5)
    same_state(small, before)


def test_densified_models_can_be_planned_again():
    dense = rf.densify(rf.apply(convnet(), PLAN))
    _, plan = rf.compress(dense, example=IMAGES, budget=rf.Budget(params=0.5))
    assert plan.layers["8"].method == "svd"
    assert plan.layers["8"].error < 1e-3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_transformer_path_is_right_and_switched_off(masked):
    model = encoder().eval()
    plan = rf.Plan({"layers.1.linear1": rf.Choice("svd", rank=32), "layers.1.linear2": rf.Choice("svd", rank=32)})
    small = rf.apply(model, plan)
    tokens, mask = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    seen = []
    small.layers[1].linear1.register_forward_pre_hook(lambda layer, _: seen.append(layer))
    with torch.no_grad():
        expected, got = (m(tokens, src_key_padding_mask=mask if masked else None) for m in (model, small))
    torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-4, atol=1e-5)
    assert seen
    assert not small.layers[1].activation_relu_or_gelu
    assert model.layers[1].activation_relu_or_gelu


def test_hugging_face_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(48, 32))
    x = torch.randn(3, 32)
    small = rf.apply(model, rf.Plan({"0": rf.Choice("svd", rank=32)}))
    assert isinstance(small[0], LowRankLinear)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def _parametrised():
    model = mlp(8, 8, 8)
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def _not_a_number():
    model = mlp(8, 8, 8)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


MISFITS = {
    "unknown layer": (mlp(8, 8), {"00": rf.Choice("svd", rank=1)}, r"'00'.*did you mean '0'"),
    "unknown dense layer": (mlp(8, 8), {"1": rf.Choice("dense")}, "'1'"),
    "beyond full": (mlp(8, 8), {"0": rf.Choice("svd", rank=9)}, "9"),
    "two ranks for one": (mlp(8, 8), {"0": rf.Choice("svd", rank=(2, 2))}, "rank"),
    "one rank for two": (convnet(), {"0": rf.Choice("tucker", rank=2)}, "rank"),
    "no such method": (mlp(8, 8), {"0": rf.Choice("tucker", rank=(2, 2))}, "tucker"),
    "option of another layer": (mlp(8, 8), {"0": rf.Choice("svd", 2, {"split": "spatial"})}, "split"),
    "bad option": (convnet(), {"0": rf.Choice("svd", 2, {"split": "diagonal"})}, "diagonal"),
    "tied": (Tied(), {"head": rf.Choice("svd", rank=2)}, "tied"),
    "packed attention": (Attention(), {"attend": rf.Choice("svd", rank=2)}, "attend.*separate_attention"),
    "factorised": (nn.Sequential(LowRankLinear(8, 8, rank=2)), {"0": rf.Choice("svd", rank=2)}, "already"),
    "parametrised": (_parametrised(), {"0": rf.Choice("svd", rank=2)}, "parametri"),
    "not finite": (_not_a_number(), {"0": rf.Choice("svd", rank=2)}, "NaN"),
    "a block": (nn.Sequential(mlp(8, 8)), {"0": rf.Choice("svd", rank=2)}, "'0'"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_is_refused(case):
    model, layers, message = MISFITS[case]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        rf.apply(model, rf.Plan(layers))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(PlanError, match="init must be 'decompose' or 'random', got 'zeros'"):
        rf.apply(convnet(), PLAN, init="zeros")


def test_a_model_that_cannot_be_copied_is_refused():
    model = mlp(8, 8)
    model.cache = model(torch.ones(1, 8))
    with pytest.raises(rf.RankfoldError, match="can't be copied"):
        rf.apply(model, rf.Plan({"0": rf.Choice("svd", rank=2)}))
