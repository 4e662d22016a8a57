"""Is every layer that may not be replaced refused, with its reason?"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from rankfold import layers
from rankfold.errors import LayerError


class MyLinear(nn.Linear):
    pass


class Wrapped(torch.Tensor):
    pass


def with_weight(layer, value, index=...):
    with torch.no_grad():
        layer.weight[index] = value
    return layer


def hooked(name, layer=None):
    layer = nn.Linear(4, 4) if layer is None else layer
    getattr(layer, name)(lambda *_: None)
    return layer


def overwritten():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def wrapped():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Wrapped))
    return layer


def old_weight_norm():
    layer = nn.Linear(4, 4)
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def quantised():
    return torch.ao.nn.quantized.dynamic.Linear(4, 4)


REFUSED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrised"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "parametrised"),
    "old weight_norm": (old_weight_norm, "WeightNorm"),
    "old spectral_norm": (lambda: spectral_norm(nn.Linear(4, 4)), "SpectralNorm"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "hooks"),
    "forward hook": (lambda: hooked("register_forward_hook"), "hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "hooks"),
    "overwritten forward": (overwritten, "forward"),
    "lazy": (lambda: nn.LazyLinear(4), "lazy"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 3), "lazy"),
    "quantised": (quantised, "quantised"),
    "subclass": (lambda: MyLinear(4, 4), "subclass of nn.Linear"),
    "weight of a subclass of Tensor": (wrapped, "Wrapped"),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(4, 4, 3), "transposed"),
    "transposed 2-D": (lambda: nn.ConvTranspose2d(4, 4, 3), "transposed"),
    "transposed 3-D": (lambda: nn.ConvTranspose3d(4, 4, 3), "transposed"),
    "bag": (lambda: nn.EmbeddingBag(4, 4), "EmbeddingBag"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "directly"),
    "output of attention": (lambda: nn.MultiheadAttention(4, 2).out_proj, "subclass of nn.Linear"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex64"),
    "integer": (lambda: nn.Linear(4, 4).requires_grad_(False).to(torch.float8_e4m3fn), "float8"),
    "NaN": (lambda: with_weight(nn.Linear(4, 4), float("nan"), 0), "4 of the 16 entries of its weight are NaN or Inf"),
    "Inf": (lambda: with_weight(nn.Conv2d(4, 4, 3), float("inf")), "NaN or Inf"),
    "zero": (lambda: with_weight(nn.Linear(4, 4), 0.0), "zero everywhere"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm=1.0"),
}


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:.*quantized", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize(("make", "fragment"), REFUSED.values(), ids=REFUSED)
def test_refused(make, fragment):
    layer = make()
    assert layers.factorisable(layer)
    assert fragment in layers.refusal(layer)


ACCEPTED = [
    nn.Linear(4, 4),
    nn.Linear(4, 4, dtype=torch.bfloat16),
    nn.Linear(4, 4, device="meta"),
    nn.Linear(4, 4).requires_grad_(False).eval(),
    nn.Conv1d(4, 4, 3),
    nn.Conv2d(4, 4, 3, groups=4, padding_mode="reflect"),
    nn.Conv3d(4, 4, 3, padding="same"),
    nn.Embedding(9, 4, padding_idx=0, sparse=True),
]


@pytest.mark.parametrize("layer", ACCEPTED, ids=str)
def test_accepted(layer):
    assert layers.factorisable(layer)
    assert layers.refusal(layer) is None
    assert layers.stock_twin(layer) is layer
    assert layers.methods_for(layer)


def test_a_refusal_can_be_lifted():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert layers.refusal(layer) is None
    handle = layer.register_forward_hook(lambda *_: None)
    assert layers.refusal(layer) is not None
    handle.remove()
    assert layers.refusal(layer) is None


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(4)], ids=str
)
def test_not_a_kind_of_layer(module):
    assert not layers.factorisable(module)
    assert layers.methods_for(module) == ()
    assert "no layer that is factorised" in layers.refusal(module)
    with pytest.raises(LayerError, match="no stock twin"):
        layers.stock_twin(module)
    with pytest.raises(LayerError, match="no method"):
        layers.layer_class(module, "svd")


def test_the_table():
    for (dense_type, method), layer in layers.TABLE.items():
        assert layer.dense_type is dense_type
        assert layer.method == method
    assert layers.layer_class(nn.Conv3d(1, 1, 1), "tucker") is layers.TuckerConv3d
    with pytest.raises(LayerError, match="'cp' does not fit Linear: its methods are svd"):
        layers.layer_class(nn.Linear(2, 2), "cp")
    assert layers.is_factorised(layers.LowRankLinear(2, 2, rank=1))
    assert not layers.is_factorised(nn.Linear(2, 2))
    with pytest.raises(TypeError):
        layers.TABLE[nn.Linear, "mine"] = nn.Linear


def test_hugging_face_conv1d():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    layer = transformers.Conv1D(6, 4).eval()
    layer.bias.requires_grad_(False)
    assert layers.factorisable(layer)
    assert layers.refusal(layer) is None
    assert layers.methods_for(layer) == layers.methods_for(nn.Linear(4, 6))
    twin, x = layers.stock_twin(layer), torch.randn(2, 3, 4)
    assert type(twin) is nn.Linear
    torch.testing.assert_close(twin(x), layer(x))
    assert (twin.training, twin.weight.requires_grad, twin.bias.requires_grad) == (False, True, False)
    assert twin.weight.is_contiguous()
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()
    call = layers.Call((2, 3, 4), (2, 3, 6))
    assert layers.dense_cost(layer, [call]) == layers.dense_cost(twin, [call])
