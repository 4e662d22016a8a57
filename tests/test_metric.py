"""Do decompositions in the metric of the outputs keep their word: the error reported, least error, bias, full rank?"""

import math

import pytest
import torch
from cases import AXES, BIASED, FORM_IDS, FORMS, example_of, form_name, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rankfold import layers
from rankfold.decompose import (
    metric_cp,
    metric_error,
    metric_tt_matrix,
    metric_tucker,
    separable,
    shared_svd,
    singular_values,
    svd,
)
from rankfold.errors import DecompositionError, LayerError, RankfoldError
from rankfold.layers import Metric, TTEmbedding
from rankfold.layers._metric import corrected_bias, output_error

few = settings(max_examples=3, deadline=None, derandomize=True)
IN_METRIC = [form for form in BIASED if form[0].method in ("svd", "tucker", "cp", "tt")]
ON_WEIGHTS = [form for form in BIASED if form not in IN_METRIC]


def ids(forms):
    return [form_name(form) for form in forms]


# CP fits three times for each: an example or two of it are in the quick tests, the property is with the slow ones
QUICK_FIRST = [
    pytest.param(form, marks=pytest.mark.slow if form[0].method == "cp" else (), id=form_name(form)) for form in BIASED
]


def inputs(n, count=None, seed=0, groups=1):
    """Inputs (groups, count, n) with correlations, unequal scales and a mean."""
    generator = torch.Generator().manual_seed(seed)
    count = 3 * n if count is None else count
    mixing = torch.randn(groups, n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    mixing = mixing + torch.eye(n, dtype=torch.float64)
    scales = torch.logspace(0, -1.5, n, dtype=torch.float64)
    return (torch.randn(groups, count, n, generator=generator, dtype=torch.float64) * scales) @ mixing + 0.3


def metric_of(x, rows=None):
    return Metric(x.mT @ x / x.shape[1], x.mean(1), rows)


def dense_of(dense_type, **changes):
    if dense_type in AXES:  # small: a decomposition in a metric is many
        changes = {"in_channels": 4, "out_channels": 6, **changes}
    dense, _ = example_of(dense_type, dtype=torch.float64, **changes)
    groups = getattr(dense, "groups", 1)
    return dense, inputs(dense.weight[0].numel(), groups=groups)


def outputs(dense, weight, bias, x):
    """The outputs (groups, count, out) of a weight for inputs (groups, count, n)."""
    y = x @ weight.detach().reshape(len(x), -1, x.shape[2]).mT
    return y if bias is None else y + bias.detach().reshape(len(x), 1, -1)


def measured(dense, layer, x, rows=None):
    """The relative error of the outputs on the inputs themselves; without their mean where there is a bias."""
    before, after = outputs(dense, dense.weight, dense.bias, x), outputs(dense, layer.weight, layer.bias, x)
    weights = 1.0 if rows is None else rows.reshape(len(x), 1, -1)
    size = before if dense.bias is None else before - before.mean(1, keepdim=True)
    return float(((weights * (before - after).square()).sum() / (weights * size.square()).sum()).sqrt())


def test_projection_form_is_the_whitening_form_with_weighted_rows():
    matrix, rows = torch.randn(12, 20, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.1
    (x,) = inputs(20)
    moment = x.T @ x / len(x)
    lower, roots = torch.linalg.cholesky(moment), rows.sqrt()[:, None]
    u, s, vh = torch.linalg.svd(roots * matrix @ lower, full_matrices=False)
    white = torch.linalg.solve_triangular(lower.T, ((u[:, :5] * s[:5]) @ vh[:5]).T, upper=True).T / roots
    found = svd(matrix, 5, second_moment=moment, output_weights=rows)
    assert_close(found.to_dense(), white, rtol=0, atol=1e-10)
    assert_close(found.u.T @ found.u, torch.eye(5, dtype=torch.float64))
    values = singular_values(matrix, second_moment=moment, output_weights=rows)
    assert_close(values, s)
    expected = float((s[5:].square().sum() / s.square().sum()).sqrt())
    assert metric_error(matrix, found.to_dense(), moment, rows) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_a_singular_moment_leaves_the_matrix_at_full_rank(shape):
    matrix = torch.randn(*shape, dtype=torch.float64)
    (x,) = inputs(shape[1], count=4)
    moment = x.T @ x / 4
    assert_close(svd(matrix, 9, second_moment=moment).to_dense(), matrix)
    assert metric_error(matrix, svd(matrix, 4, second_moment=moment).to_dense(), moment) < 1e-7
    assert (singular_values(matrix, second_moment=moment)[4:] < 1e-7).all()


@pytest.mark.parametrize("form", BIASED, ids=ids(BIASED))
@pytest.mark.parametrize("count", [None, 3])
def test_full_rank_is_the_dense_layer_in_any_metric(form, count):
    layer, options = form
    dense, x = dense_of(layer.dense_type)
    metric = metric_of(x if count is None else x[:, :count])
    full = layer.full_rank(dense, **options)
    copy = layer.from_dense(dense, rank=full, metric=metric, **options)
    assert_close(copy.weight, dense.weight, rtol=1e-7, atol=1e-7)
    assert_close(copy.bias, dense.bias, rtol=1e-7, atol=1e-7)
    assert layer.errors(dense, [full], metric=metric, **options)[0] < 1e-6


def weighted(dense, given):
    return torch.rand(dense.weight.shape[0], dtype=torch.float64) + 0.05 if given else None


@pytest.mark.parametrize("form", QUICK_FIRST)
@given(data=st.data())
@few
def test_error_is_that_of_the_outputs_and_never_above_the_weights_decomposition(form, data):
    layer, options = form
    changes = {"bias": data.draw(st.booleans())}
    if layer.dense_type in AXES:
        changes["groups"] = data.draw(st.sampled_from([1, 2]))
    dense, x = dense_of(layer.dense_type, **changes)
    rows = weighted(dense, data.draw(st.booleans()))
    metric = metric_of(x if data.draw(st.booleans()) else x[:, : x.shape[2] // 2], rows)
    rank = part_of(layer.full_rank(dense, **options), data.draw(st.floats(0.1, 0.9)))
    seen = x if float(metric.second[0].sub(metric_of(x).second[0]).abs().max()) == 0 else x[:, : x.shape[2] // 2]
    small = layer.from_dense(dense, rank=rank, metric=metric, **options)
    plain = layer.from_dense(dense, rank=rank, **options)
    error = output_error(layer, dense, small.weight, metric)
    assert error == pytest.approx(measured(dense, small, seen, rows), rel=1e-5, abs=1e-7)
    assert error <= output_error(layer, dense, plain.weight, metric) * (1 + 1e-6) + 1e-7
    (predicted,) = layer.errors(dense, [rank], metric=metric, **options)
    if layer.method == "svd" and options.get("split") != "spatial":
        assert predicted == pytest.approx(error, rel=1e-5, abs=1e-6)
    else:  # a local fit may end a little above what the fits that the curve is drawn through reached
        assert predicted >= error * (0.9 if layer.method in ("cp", "tt") else 1 - 1e-6) - 1e-6


@pytest.mark.parametrize("form", IN_METRIC, ids=ids(IN_METRIC))
def test_the_metric_pays_and_its_curve_falls(form):
    layer, options = form
    dense, x = dense_of(layer.dense_type, **({"groups": 1} if layer.dense_type in AXES else {}))
    metric = metric_of(x)
    ranks = [part_of(layer.full_rank(dense, **options), share) for share in (0.2, 0.4, 0.7)]
    curve = layer.errors(dense, ranks, metric=metric, **options)
    assert list(curve) == sorted(curve, reverse=True)
    for rank, predicted in zip(ranks, curve, strict=True):
        small, plain = (layer.from_dense(dense, rank=rank, metric=m, **options) for m in (metric, None))
        error = output_error(layer, dense, small.weight, metric)
        assert error < 0.98 * output_error(layer, dense, plain.weight, metric) + 1e-7
        assert error <= predicted * (1 + 1e-6) + 1e-6 <= 2.5 * error + 0.02


@pytest.mark.parametrize("form", BIASED, ids=ids(BIASED))
def test_the_bias_keeps_the_mean_of_the_outputs(form):
    layer, options = form
    dense, x = dense_of(layer.dense_type)
    small = layer.from_dense(dense, rank=part_of(layer.full_rank(dense, **options)), metric=metric_of(x), **options)
    before, after = (outputs(dense, twin.weight, twin.bias, x).mean(1) for twin in (dense, small))
    assert_close(after, before)
    plain = layer.from_dense(dense, rank=small.rank, **options)
    assert_close(plain.bias, dense.bias)
    assert corrected_bias(dense_of(layer.dense_type, bias=False)[0], small.weight, metric_of(x)) is None


@pytest.mark.parametrize("form", IN_METRIC, ids=ids(IN_METRIC))
def test_options_dtype_and_mode_are_kept_in_a_metric(form):
    layer, options = form
    dense, x = example_of(layer.dense_type)
    dense.bias.requires_grad_(False)
    dense.eval()
    metric = metric_of(inputs(dense.weight[0].numel(), groups=getattr(dense, "groups", 1)))
    small = layer.from_dense(dense, rank=part_of(layer.full_rank(dense, **options)), metric=metric, **options)
    assert small(x).shape == dense(x).shape
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert not small.training and not small.bias.requires_grad
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_weighted_rows_are_a_scaled_problem():
    dense, x = dense_of(nn.Conv2d, groups=1, bias=False)
    rows = torch.rand(6, dtype=torch.float64) + 0.1
    scaled = nn.Conv2d(4, 6, dense.kernel_size, bias=False, dtype=torch.float64)
    with torch.no_grad():
        scaled.weight.copy_(dense.weight * rows.sqrt()[:, None, None, None])
    for layer, options, rank in (
        (layers.LowRankConv2d, {"split": "channel"}, 4),
        (layers.LowRankConv2d, {"split": "spatial"}, 6),
        (layers.TuckerConv2d, {}, (5, 4)),
    ):
        ours = layer.errors(dense, [rank], metric=metric_of(x, rows), **options)
        assert ours == pytest.approx(layer.errors(scaled, [rank], metric=metric_of(x), **options), rel=1e-6)
    one = layers.LowRankConv2d.from_dense(dense, rank=4, metric=metric_of(x, rows)).weight
    other = layers.LowRankConv2d.from_dense(scaled, rank=4, metric=metric_of(x)).weight
    assert_close(one * rows.sqrt()[:, None, None, None], other)


@pytest.mark.parametrize("layer", [layers.TTConv2d, layers.CPConv2d, layers.TuckerConv2d, layers.LowRankConv2d])
def test_heavy_rows_are_kept_better(layer):
    dense, x = dense_of(nn.Conv2d, groups=1)
    rows = torch.ones(6, dtype=torch.float64)
    rows[:2] = 100
    rank = part_of(layer.full_rank(dense), 0.3)
    errors = {}
    for chosen in (None, rows):
        small = layer.from_dense(dense, rank=rank, metric=metric_of(x, chosen))
        errors[chosen is None] = output_error(layer, dense, small.weight, metric_of(x, rows))
    assert errors[False] < 0.9 * errors[True]


def test_a_group_that_nothing_reaches_costs_nothing():
    dense, x = dense_of(nn.Conv2d)
    x[1] = 0.7  # a constant: the bias takes it up
    for layer, options in ((layers.LowRankConv2d, {}), (layers.TuckerConv2d, {}), (layers.TTConv2d, {})):
        rank = part_of(layer.full_rank(dense, **options))
        small = layer.from_dense(dense, rank=rank, metric=metric_of(x), **options)
        assert measured(dense, small, x) == pytest.approx(output_error(layer, dense, small.weight, metric_of(x)))
    x[0] = 0.1
    assert layers.LowRankConv2d.errors(dense, [1], metric=metric_of(x)) == (0.0,)
    assert layers.TTConv2d.errors(dense, [1], metric=metric_of(x)) == (0.0,)


def exact_moment(dims, seed=0):
    """A second moment that is a Kronecker product, and its marginals."""
    parts = [inputs(n, seed=seed + k)[0] for k, n in enumerate(dims)]
    marginals = [part.T @ part / len(part) for part in parts]
    whole = marginals[0]
    for marginal in marginals[1:]:
        whole = torch.kron(whole, marginal)
    return whole


def test_alternating_decompositions_never_raise_the_error_and_report_it():
    kernel = torch.randn(10, 6, 3, 2, dtype=torch.float64)
    (x,) = inputs(36)
    moment = x.T @ x / len(x)
    found = {
        "tucker": metric_tucker(kernel, (5, 3), second_moment=moment, tolerance=0.0),
        "cp": metric_cp(kernel.flatten(2), 8, second_moment=moment, tolerance=0.0),
        "spatial": separable(kernel, 7, second_moment=moment, tolerance=0.0),
        "tt": metric_tt_matrix(kernel.flatten(1), (2, 5), (6, 6), 5, second_moment=moment),
    }
    for name, result in found.items():
        assert list(result.trace) == sorted(result.trace, reverse=True), name
        assert len(result.trace) > 3 and result.trace[-1] < 0.99 * result.trace[0], name
        again = metric_error(kernel.flatten(1), result.to_dense().reshape(10, 36), moment)
        assert again == pytest.approx(result.trace[-1], rel=1e-6), name
        plain = (result.to_dense().reshape(10, 36) - kernel.flatten(1)).norm() / kernel.norm()
        assert result.error == pytest.approx(float(plain), rel=1e-6), name


def test_tucker_in_an_identity_metric_is_hooi():
    kernel, eye = torch.randn(8, 6, 3, dtype=torch.float64), torch.eye(18, dtype=torch.float64)
    rank = (4, 3)
    (estimate,) = layers.TuckerConv1d.errors(
        conv := layers.TuckerConv1d(6, 8, 3, rank=rank, dtype=torch.float64).to_dense(),
        [rank],
        metric=Metric(eye[None], torch.zeros(1, 18, dtype=torch.float64)),
    )
    assert metric_tucker(kernel, rank, second_moment=eye).error < 1
    assert estimate == pytest.approx(layers.TuckerConv1d.errors(conv, [rank])[0], abs=2e-4)


def test_spatial_split_is_exact_where_the_moment_is_a_product():
    """With C = C_1 ⊗ C_2 the split is an SVD of `(I ⊗ C_2)^(1/2) W C_1^(1/2)`, and its tails are the errors."""
    kernel, moment = torch.randn(5, 4, 3, 2, dtype=torch.float64), exact_moment((12, 2))
    first, second = exact_moment((12,)), exact_moment((2,), seed=1)
    roots = [torch.linalg.cholesky(side) for side in (first, second)]
    white = torch.einsum("tsj,sa,jb->tba", kernel.flatten(1, 2).reshape(5, 12, 2), *roots).flatten(0, 1)
    values = torch.linalg.svdvals(white).square()
    for rank in (2, 5, 8):
        found = separable(kernel, rank, second_moment=moment)
        assert found.trace[-1] == pytest.approx(float((values[rank:].sum() / values.sum()).sqrt()), rel=1e-5)


def test_shared_basis_is_the_best_of_its_size():
    matrices = [torch.randn(m, 10, dtype=torch.float64) for m in (6, 4, 5)]
    (x,) = inputs(10)
    moment = x.T @ x / len(x)
    shared = shared_svd(matrices, 4, second_moment=moment)
    stacked, found = torch.cat(matrices), torch.cat(shared.to_dense())
    values = singular_values(stacked, second_moment=moment).square()
    assert metric_error(stacked, found, moment) == pytest.approx(float((values[4:].sum() / values.sum()).sqrt()))
    assert shared.num_params == 4 * (15 + 10) and [left.shape[0] for left in shared.lefts] == [6, 4, 5]
    assert shared.error == pytest.approx(float((stacked - found).norm() / stacked.norm()))
    with pytest.raises(DecompositionError, match="as many columns"):
        shared_svd([torch.ones(2, 3), torch.ones(2, 4)], 1)


def broken(metric, **changes):
    return Metric(**{"second": metric.second, "mean": metric.mean, "output_weights": metric.output_weights, **changes})


def indefinite(n):
    diagonal = torch.ones(n, dtype=torch.float64)
    diagonal[0] = -1
    return torch.diag(diagonal)[None]


BAD = {
    "second": (lambda m: broken(m, second=m.second[:, 1:, 1:]), "second of the metric"),
    "mean": (lambda m: broken(m, mean=m.mean[:, 1:]), "mean of the metric"),
    "output weights": (lambda m: broken(m, output_weights=torch.ones(3)), "output_weights of the metric"),
    "nan": (lambda m: broken(m, second=m.second * math.nan), "NaN or Inf"),
    "nan mean": (lambda m: broken(m, mean=m.mean * math.inf), "NaN or Inf"),
    "negative weights": (lambda m: broken(m, output_weights=-torch.ones(10)), "mean squares"),
    "skew": (lambda m: broken(m, second=m.second + torch.ones(12, 12).triu(1)), "not symmetric"),
    "large mean": (lambda m: broken(m, mean=m.mean + 10), "larger than its second moment"),
    "indefinite": (lambda m: broken(m, second=indefinite(12), mean=0 * m.mean), "second moment"),
}


@pytest.mark.parametrize("form", [f for f in BIASED if f[0].dense_type is nn.Linear], ids=lambda f: form_name(f))
@pytest.mark.parametrize("case", BAD)
def test_bad_metrics_are_refused(form, case):
    layer, options = form
    spoil, message = BAD[case]
    if case == "indefinite" and layer.method not in ("svd", "tt"):
        pytest.skip("the weight alone is decomposed")
    dense, x = dense_of(nn.Linear)
    metric = spoil(metric_of(x))
    for call in (
        lambda: layer.errors(dense, [2], metric=metric, **options),
        lambda: layer.from_dense(dense, rank=2, metric=metric, **options),
    ):
        with pytest.raises(RankfoldError, match=message):
            call()


@pytest.mark.parametrize("form", [f for f in FORMS if f[0] is TTEmbedding], ids=lambda f: form_name(f))
def test_embeddings_take_no_metric(form):
    layer, options = form
    dense, _ = example_of(nn.Embedding)
    metric = metric_of(inputs(12))
    with pytest.raises(LayerError, match="embedding has no metric"):
        layer.errors(dense, [2], metric=metric, **options)
    with pytest.raises(LayerError, match="embedding has no metric"):
        layer.from_dense(dense, rank=2, metric=metric, **options)


STOREY_ZERO = {
    "svd": lambda **m: svd(torch.ones(6, 12), 2, **m),
    "values": lambda **m: singular_values(torch.ones(6, 12), **m),
    "tucker": lambda **m: metric_tucker(torch.ones(6, 4, 3), (2, 2), **m),
    "cp": lambda **m: metric_cp(torch.ones(6, 4, 3), 2, **m),
    "separable": lambda **m: separable(torch.ones(6, 2, 3, 2), 2, **m),
    "tt": lambda **m: metric_tt_matrix(torch.ones(6, 12), (2, 3), (3, 4), 2, **m),
    "error": lambda **m: metric_error(torch.ones(6, 12), torch.ones(6, 12), **m),
}
MOMENTS = {
    "size": (torch.eye(5), None, "12"),
    "zero": (torch.zeros(12, 12), None, "zero"),
    "nan": (torch.full((12, 12), math.nan), None, "NaN"),
    "skew": (torch.eye(12) + torch.ones(12, 12).triu(1), None, "not symmetric"),
    "negative": (-torch.eye(12), None, "not positive semi-definite"),
    "rows": (torch.eye(12), torch.ones(5), "6 outputs"),
    "negative rows": (torch.eye(12), -torch.ones(6), "mean squares"),
}


@pytest.mark.parametrize("name", STOREY_ZERO)
@pytest.mark.parametrize("case", MOMENTS)
def test_decompositions_refuse_what_is_no_metric(name, case):
    moment, rows, message = MOMENTS[case]
    if (name, case) == ("tt", "zero"):
        pytest.skip("a group of rows that no input reaches has a moment of zeros")
    with pytest.raises(DecompositionError, match=message):
        STOREY_ZERO[name](second_moment=moment, output_weights=rows)


def test_weights_of_outputs_need_a_moment():
    for call in (svd, singular_values):
        with pytest.raises(DecompositionError, match="second moment"):
            call(torch.ones(3, 4), *((1,) if call is svd else ()), output_weights=torch.ones(3))


def test_forms_cover_every_layer_with_a_bias():
    assert {form[0] for form in IN_METRIC} | {form[0] for form in ON_WEIGHTS} == {
        layer for layer in layers.TABLE.values() if layer.dense_type is not nn.Embedding
    }
    assert len(FORM_IDS) == len(FORMS)
