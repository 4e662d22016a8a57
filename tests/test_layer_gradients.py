"""Are the gradients of a factorised layer those of the dense layer, through the factors?"""

import pytest
import torch
from cases import FORM_IDS, FORMS, dense_layers, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankfold import layers
from rankfold.testing import Case, check_gradients

few = settings(max_examples=6, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the dense layer
forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)


@forms
@given(data=st.data(), share=st.floats(0, 1))
@few
def test_gradients_of_factors_and_input(layer, options, data, share):
    dense, x = data.draw(dense_layers(layer.dense_type))
    check_gradients(layer, Case(dense, x, part_of(layer.full_rank(dense, **options), share), options))


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
