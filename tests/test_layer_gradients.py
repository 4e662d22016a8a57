"""Are the gradients of a factorised layer those of the dense layer, through the factors?"""

import pytest
import torch
from cases import FORM_IDS, FORMS, dense_layers, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from rankfold import layers

few = settings(max_examples=6, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the dense layer
forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)


def leaf(x):
    return x.clone().requires_grad_(x.is_floating_point())


def gradients(output, seen, *tensors):
    return torch.autograd.grad((output * seen).sum(), tensors, allow_unused=True)


@forms
@given(data=st.data(), share=st.floats(0, 1))
@few
def test_gradients_of_factors_and_input(layer, options, data, share):
    dense, x = data.draw(dense_layers(layer.dense_type))
    rank = part_of(layer.full_rank(dense, **options), share)
    built = layer.like(dense, rank=rank, **options)
    parameters = tuple(built.parameters())
    seen = torch.randn_like(dense(x))
    here, there = leaf(x), leaf(x)
    values = {"weight": built.weight} | ({} if getattr(built, "bias", None) is None else {"bias": built.bias})
    through_weight = functional_call(dense, values, there)
    inputs = ((here,), (there,)) if x.is_floating_point() else ((), ())
    actual = gradients(built(here), seen, *inputs[0], *parameters)
    expected = gradients(through_weight, seen, *inputs[1], *parameters)
    assert all(gradient is not None for gradient in actual)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@forms
@given(data=st.data())
@few
def test_gradients_at_full_rank_are_the_dense_layers(layer, options, data):
    dense, x = data.draw(dense_layers(layer.dense_type))
    built = layer.from_dense(dense, rank=layer.full_rank(dense, **options), **options)
    seen = torch.randn_like(dense(x))
    back = built.to_dense()
    actual = gradients(back(x), seen, *back.parameters())
    expected = gradients(dense(x), seen, *dense.parameters())
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    if x.is_floating_point():
        here, there = leaf(x), leaf(x)
        torch.testing.assert_close(gradients(built(here), seen, here), gradients(dense(there), seen, there))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_padding_row_of_an_embedding_stays_zero(sparse):
    dense = nn.Embedding(12, 6, padding_idx=3, sparse=sparse)
    for layer in (layers.LowRankEmbedding.from_dense(dense, rank=2), layers.LowRankEmbedding.like(dense, rank=2)):
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            layer(torch.tensor([3, 3, 1, 5])).square().sum().backward()
            assert layer.down.weight.grad.is_sparse == sparse
            gradient = layer.down.weight.grad.to_dense()
            assert not gradient[3].any()
            assert gradient[[1, 5]].any()
            optimiser.step()
        assert not layer.weight[3].any()
        assert not layer(torch.tensor([3])).any()


def test_scale_grad_by_freq_divides_by_the_count():
    plain = layers.LowRankEmbedding(12, 6, rank=2)
    scaled = layers.LowRankEmbedding(12, 6, scale_grad_by_freq=True, rank=2)
    scaled.load_state_dict(plain.state_dict())
    for layer in (plain, scaled):
        layer(torch.tensor([4, 4, 4, 1])).sum().backward()
    torch.testing.assert_close(plain.down.weight.grad[4], 3 * scaled.down.weight.grad[4])
    torch.testing.assert_close(plain.down.weight.grad[1], scaled.down.weight.grad[1])


def test_a_tied_head_trains_the_embedding():
    embedding = layers.LowRankEmbedding(10, 4, rank=2)
    head = embedding.tied_head()
    head(torch.ones(1, 4)).square().sum().backward()
    assert embedding.down.weight.grad.any()
    assert {id(p) for p in head.parameters()} == {id(p) for p in embedding.parameters()}
