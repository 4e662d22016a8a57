"""Is the error of a factorised layer what its singular values say, or within the bound of its method?"""

import math

import pytest
import torch
from cases import FORM_IDS, FORMS, dense_layers, part_of
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=10, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the dense layer


def forms_of(*methods):
    rows = [
        pytest.param(*form, id=name) for form, name in zip(FORMS, FORM_IDS, strict=True) if form[0].method in methods
    ]
    return pytest.mark.parametrize(("layer", "options"), rows)


def draw_layer(data, layer, options):
    """A random dense layer, a rank for it, the error that is predicted there and the one that is made."""
    dense, _ = data.draw(dense_layers(layer.dense_type))
    rank = part_of(layer.full_rank(dense, **options), data.draw(st.floats(0, 1)))
    (predicted,) = layer.errors(dense, [rank], **options)
    weight, expected = layer.from_dense(dense, rank=rank, **options).weight.detach(), dense.weight.detach()
    return dense, rank, predicted, float((weight - expected).norm() / expected.norm())


@forms_of("svd")
@given(data=st.data())
@few
def test_svd_errors_are_the_tails(layer, options, data):
    dense, rank, predicted, actual = draw_layer(data, layer, options)
    assert actual == pytest.approx(predicted, rel=1e-6, abs=1e-7)
    (spectrum,) = layer.spectra(dense, **options)  # over groups their root mean square: its tails are the errors too
    energies = spectrum.values.square()
    assert actual == pytest.approx(math.sqrt(float(energies[rank:].sum() / energies.sum())), rel=1e-6, abs=1e-7)


@forms_of("tucker")
@given(data=st.data())
@few
def test_tucker_errors_are_within_their_bounds(layer, options, data):
    """At least the larger tail of the two unfoldings, at most the root of the sum of their squares."""
    dense, rank, predicted, actual = draw_layer(data, layer, options)
    energies = [spectrum.values.square() for spectrum in layer.spectra(dense, **options)]
    tails = [float(e[r:].sum() / e.sum()) for e, r in zip(energies, rank, strict=True)]
    assert actual <= predicted + 1e-7
    assert math.sqrt(max(tails)) - 1e-7 <= actual
    assert predicted <= math.sqrt(sum(tails)) + 1e-7


@forms_of("tt", "cp")
@given(data=st.data())
@few
def test_other_errors_are_at_most_what_is_predicted(layer, options, data):
    _, _, predicted, actual = draw_layer(data, layer, options)
    assert actual <= 1.02 * predicted + 1e-6


@forms_of("tt")
@given(data=st.data())
@few
def test_tensor_train_errors_are_within_the_bound_of_their_unfoldings(layer, options, data):
    dense, rank, _, actual = draw_layer(data, layer, options)
    train = layer._form_of(dense)
    folded = train.fold(layer._matrix_of(dense))
    bound = 0.0
    for k, bond in enumerate(train.chain(rank).ranks[1:-1]):
        values = torch.linalg.svdvals(folded.flatten(k + 1).reshape(math.prod(folded.shape[: k + 1]), -1))
        bound += float(values[bond:].square().sum())
    assert actual <= math.sqrt(bound) / float(dense.weight.detach().norm()) + 1e-7
