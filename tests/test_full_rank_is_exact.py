"""Does a layer at full rank compute what the dense layer computes, and at any rank what its weight says?"""

import pytest
import torch
from cases import (
    CONVOLUTIONS,
    FORM_IDS,
    FORMS,
    PADDING_MODES,
    dense_layers,
    example_of,
    form_name,
    part_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold import layers
from rankfold.errors import LayerError
from rankfold.testing import Case, check_full_rank, check_weight

few = settings(max_examples=8, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the dense layer
forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
convolutions = pytest.mark.parametrize(("layer", "options"), CONVOLUTIONS, ids=map(form_name, CONVOLUTIONS))


@forms
@given(data=st.data())
@few
def test_full_rank_in_double_and_single_precision(layer, options, data):
    check_full_rank(layer, Case(*data.draw(dense_layers(layer.dense_type)), options=options))


@forms
@given(data=st.data())
@few
def test_any_rank_is_the_dense_layer_of_its_weight(layer, options, data):
    dense, x = data.draw(dense_layers(layer.dense_type))
    rank = part_of(layer.full_rank(dense, **options), data.draw(st.floats(0, 1)))
    check_weight(layer, Case(dense, x, rank, options))


@convolutions
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_borders_and_corners_are_padded_as_by_the_dense_layer(layer, options, mode):
    padding = (3, 2, 1)[: len(example_of(layer.dense_type)[0].kernel_size)]
    dense, x = example_of(layer.dense_type, padding=padding, padding_mode=mode, dtype=torch.float64, stride=1)
    built = layer.from_dense(dense, rank=layer.full_rank(dense, **options), **options)
    difference = (built(x) - dense(x)).detach().abs().amax((0, 1))
    corner = difference[(0,) * difference.ndim]
    assert float(difference.max()) < 1e-12
    assert float(corner) < 1e-12


@convolutions
def test_depthwise_layers_are_exact_where_they_have_variants(layer, options):
    dense, x = example_of(layer.dense_type, out_channels=8, groups=8, dtype=torch.float64)
    built = layer.from_dense(dense, rank=layer.full_rank(dense, **options), **options)
    torch.testing.assert_close(built(x), dense(x))


def test_a_tied_head_is_the_transposed_table():
    embedding = layers.LowRankEmbedding(30, 8, rank=3, dtype=torch.float64)
    values = torch.randn(30, dtype=torch.float64)
    head, x = embedding.tied_head(bias=values), torch.randn(2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(head(x), x @ embedding.weight.T + values)
    torch.testing.assert_close(head.to_dense()(x), head(x))
    assert head.down is embedding.down
    assert head.up is embedding.up
    assert embedding.tied_head().bias is None
    head.weight = embedding.weight  # what it is already
    with pytest.raises(LayerError, match="change the factors"):
        head.weight = embedding.weight + 1
    assert not embedding.tied_head(bias=True).bias.any()
