"""Tables of cases: every factorised layer with every option, and dense layers of every shape to try them on."""

import torch
from hypothesis import strategies as st
from torch import nn

from rankfold import layers

DENSE_TYPES = tuple(row.kind for row in layers.DENSE_TYPES if row.stock)
AXES = {row.kind: row.axes for row in layers.DENSE_TYPES if row.stock and row.axes}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# layer × method × option: a new layer is a new row here, and all tests of layers run on it
FORMS = [
    (layers.LowRankLinear, {}),
    (layers.LowRankEmbedding, {}),
    (layers.LowRankConv1d, {"split": "channel"}),
    (layers.LowRankConv2d, {"split": "channel"}),
    (layers.LowRankConv2d, {"split": "spatial"}),
    (layers.LowRankConv3d, {"split": "channel"}),
    (layers.LowRankConv3d, {"split": "spatial"}),
    (layers.CPConv1d, {"separable": False}),
    (layers.CPConv2d, {"separable": False}),
    (layers.CPConv2d, {"separable": True}),
    (layers.CPConv3d, {"separable": False}),
    (layers.CPConv3d, {"separable": True}),
    (layers.TuckerConv1d, {}),
    (layers.TuckerConv2d, {}),
    (layers.TuckerConv3d, {}),
    (layers.TTLinear, {}),
    (layers.TTEmbedding, {}),
    (layers.TTConv1d, {}),
    (layers.TTConv2d, {}),
    (layers.TTConv3d, {}),
    (layers.BTTLinear, {}),
    (layers.KroneckerLinear, {}),
    (layers.TRLinear, {}),
    (layers.SVDLinear, {}),
    (layers.SVDConv1d, {"split": "channel"}),
    (layers.SVDConv2d, {"split": "channel"}),
    (layers.SVDConv2d, {"split": "spatial"}),
    (layers.SVDConv3d, {"split": "spatial"}),
]


def form_name(form):
    layer, options = form
    return "-".join([layer.__name__, *(f"{name}={value}" for name, value in options.items())])


FORM_IDS = [form_name(form) for form in FORMS]
CONVOLUTIONS = [form for form in FORMS if form[0].dense_type in AXES]
BIASED = [form for form in FORMS if form[0].dense_type is not nn.Embedding]


def example_of(dense_type, **changes):
    """A layer that has everything, and an input for it: groups, uneven kernels, stride, dilation, padding, bias."""
    if dense_type is nn.Linear:
        dense = nn.Linear(**{"in_features": 12, "out_features": 10, **changes})
        return dense, torch.randn(2, 3, 12).to(dense.weight.dtype)
    if dense_type is nn.Embedding:
        return nn.Embedding(**{"num_embeddings": 20, "embedding_dim": 12, **changes}), torch.randint(20, (4, 5))
    axes = AXES[dense_type]
    shape = {"kernel_size": (3, 2, 3)[:axes], "stride": (2, 1, 1)[:axes], "dilation": (1, 2, 1)[:axes]}
    usual = {"in_channels": 8, "out_channels": 12, "padding": (1, 2, 0)[:axes], "groups": 2, **shape}
    dense = dense_type(**{**usual, **changes})
    return dense, torch.randn(2, dense.in_channels, *(9, 8, 7)[:axes]).to(dense.weight.dtype)


def part_of(full, share=0.5):
    """A rank of about this share of the full one."""
    if isinstance(full, tuple):
        return tuple(max(1, round(r * share)) for r in full)
    return max(1, round(full * share))


def small_rank(layer, dense, options):
    """A rank between one and the full one, that would be used: inside the grid where there is one."""
    grid = layer.rank_grid(dense, **options)
    return grid[len(grid) // 2] if grid else part_of(layer.full_rank(dense, **options))


@st.composite
def dense_layers(draw, dense_type, dtype=torch.float64):
    """A stock layer of random shape and options with random values, and an input that it takes."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size = st.integers(1, 9)
    if dense_type is nn.Linear:
        dense = nn.Linear(draw(size), draw(size), bias=draw(st.booleans()), dtype=dtype)
        leading = draw(st.sampled_from([(), (3,), (2, 3)]))
        return dense, torch.randn(*leading, dense.in_features, dtype=dtype)
    if dense_type is nn.Embedding:
        rows = draw(size)
        dense = nn.Embedding(rows, draw(size), padding_idx=draw(st.sampled_from([None, 0, -1])), dtype=dtype)
        return dense, torch.randint(rows, draw(st.sampled_from([(3,), (2, 3)])))
    return draw(_convolutions(dense_type, dtype))


@st.composite
def _convolutions(draw, dense_type, dtype):
    axes = AXES[dense_type]

    def per_axis(most, least=1):
        return draw(st.tuples(*[st.integers(least, most)] * axes))

    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 4)) for _ in range(2))
    kernel, dilation = per_axis(4), per_axis(2)
    padding = draw(st.sampled_from(["same", "valid", None]))
    dense = dense_type(
        inputs,
        outputs,
        kernel,
        stride=1 if padding == "same" else per_axis(2),
        padding=per_axis(2, 0) if padding is None else padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
        dtype=dtype,
    )
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    space = [draw(st.integers(max(3, n), n + 4)) for n in reach]  # beyond the kernel, and any padding of two
    leading = draw(st.sampled_from([(), (1,), (2,)]))
    return dense, torch.randn(*leading, inputs, *space, dtype=dtype)
