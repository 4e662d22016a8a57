"""The layers of other libraries, as plug-ins: whatever of them is installed takes part, holding given factors.

    python -m pip install -e '.[bench]'

Each builder returns the layers by name, with the factors of the layer under test copied into them; nothing of
theirs is changed. A library that has no such layer is not in the answer.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = {"tltorch": "tensorly-torch", "tednet": "tednet", "torchtt": "torchTT", "opt_einsum": "opt_einsum"}


def _load(module: str) -> ModuleType | None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torchtt: no compiled extension
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    return None


MODULES = {name: _load(name) for name in PACKAGES}
VERSIONS = {
    package: importlib.metadata.version(package) if MODULES[name] else "absent" for name, package in PACKAGES.items()
}

Layers = dict[str, nn.Module]


class _Adapted(nn.Module):
    """A layer of another library between a reshape before and one after."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self._before, self._after = layer, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self._after(self.layer(self._before(x)))


class _WithoutPathSearch(nn.Module):
    """A layer whose einsum goes from left to right, as torch does where opt_einsum is not installed."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.opt_einsum.flags(enabled=False):
            return self.layer(x)


def _set(target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"the peer's factor has the shape {tuple(target.shape)}, ours {tuple(value.shape)}")
    with torch.no_grad():
        target.copy_(value)


@contextlib.contextmanager
def _quietly() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def tt_linear(cores: Sequence[Tensor]) -> Layers:
    """Return tensor-train matrices `(r, out, in, r')` applied to `(rows, in)`, without bias."""
    out_shape, in_shape = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
    ranks = (*(c.shape[0] for c in cores), 1)
    layers: Layers = {}
    with _quietly():
        if tltorch := MODULES["tltorch"]:
            for implementation in ("factorized", "reconstructed"):
                layer = tltorch.FactorizedLinear(
                    in_shape, out_shape, bias=False, factorization="blocktt", rank=ranks, implementation=implementation
                )
                for target, core in zip(layer.weight.factors, cores, strict=True):
                    _set(target, core)
                layers[f"tensorly-torch, {implementation}"] = layer
            layers["tensorly-torch, factorized, no path search"] = _WithoutPathSearch(
                layers["tensorly-torch, factorized"]
            )
        if tednet := MODULES["tednet"]:
            ends = {0: 2, len(cores) - 1: 3}
            layer = importlib.import_module(f"{tednet.__name__}.tnn.tensor_train").TTLinear(
                list(in_shape), list(out_shape), list(ranks[1:-1]), bias=False
            )
            for k, core in enumerate(cores):
                value = core.permute(2, 1, 0, 3)  # in, out, r, r'
                _set(getattr(layer, f"node{k}"), value.squeeze(ends[k]) if k in ends else value)
            layers["tednet"] = layer
        if torchtt := MODULES["torchtt"]:
            layers["torchTT"] = _torchtt(torchtt, cores, in_shape, out_shape, ranks)
    return layers


def _torchtt(module: ModuleType, cores: Sequence[Tensor], *sizes: tuple[int, ...]) -> nn.Module:
    in_shape, out_shape, ranks = map(list, sizes)
    layer = module.nn.LinearLayerTT(in_shape, out_shape, ranks)
    for target, core in zip(layer.cores, cores, strict=True):
        _set(target, core)
    layer.bias.requires_grad_(False)  # it cannot do without one; it is zero
    return _Adapted(layer, lambda x: x.reshape(-1, *in_shape), lambda y: y.flatten(1))


def tt_embedding(cores: Sequence[Tensor]) -> Layers:
    """Return tensor-train tables with the cores `(r, out, in, r')`, rows over `in`."""
    out_shape, in_shape = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
    ranks = (*(c.shape[0] for c in cores), 1)
    if not (tltorch := MODULES["tltorch"]):
        return {}
    rows, width = torch.Size(in_shape).numel(), torch.Size(out_shape).numel()
    with _quietly():
        layer = tltorch.FactorizedEmbedding(
            rows,
            width,
            auto_tensorize=False,
            tensorized_num_embeddings=in_shape,
            tensorized_embedding_dim=out_shape,
            factorization="blocktt",
            rank=ranks,
        )
    for target, core in zip(layer.weight.factors, cores, strict=True):
        _set(target, core.transpose(1, 2))
    return {"tensorly-torch": layer}


def _tltorch_conv(channels: int, factorization: str, rank: Any, implementation: str, **options: Any) -> nn.Module:
    module = MODULES["tltorch"]
    if module is None:
        raise ImportError("tensorly-torch")
    return module.FactorizedConv(
        channels,
        channels,
        kernel_size=3,
        order=2,
        padding=1,
        factorization=factorization,
        rank=rank,
        implementation=implementation,
        **options,
    )


def cp_conv(factors: Mapping[str, Tensor]) -> Layers:
    """Return 3x3 convolutions (padding 1) of the factors `down` (r, in), `vertical`, `horizontal` (r, 3), `up`."""
    down, vertical, horizontal, up = (factors[name] for name in ("down", "vertical", "horizontal", "up"))
    (rank, channels), layers = down.shape, {}
    with _quietly():
        if MODULES["tltorch"]:
            for implementation in ("factorized", "mobilenet", "reconstructed"):
                layer = _tltorch_conv(channels, "cp", rank, implementation)
                values = (up, down.T, vertical.T, horizontal.T)
                for target, value in zip(layer.weight.factors, values, strict=True):
                    _set(target, value)
                _set(layer.weight.weights, torch.ones(rank))
                layers[f"tensorly-torch, {implementation}"] = layer
        if tednet := MODULES["tednet"]:
            layer = importlib.import_module(f"{tednet.__name__}.tnn.cp").CPConv2D(
                channels, channels, rank, 3, padding=1, bias=False
            )
            for k in range(rank):
                for name, row in (("in", down), ("out", up.T), ("k0", vertical), ("k1", horizontal)):
                    _set(getattr(layer, f"node_{name}_block{k}"), row[k])
            layers["tednet"] = layer
    return layers


def tucker_conv(factors: Mapping[str, Tensor]) -> Layers:
    """Return 3x3 convolutions (padding 1) of the factors `down` (r, in), `core` (r', r, 3, 3) and `up` (out, r')."""
    down, core, up = (factors[name] for name in ("down", "core", "up"))
    channels, layers = down.shape[1], {}
    with _quietly():
        if MODULES["tltorch"]:
            for implementation in ("factorized", "reconstructed"):
                rank = tuple(core.shape)
                layer = _tltorch_conv(channels, "tucker", rank, implementation, fixed_rank_modes="spatial")
                _set(layer.weight.core, core)
                values = (up, down.T, torch.eye(3), torch.eye(3))
                for target, value in zip(layer.weight.factors, values, strict=True):
                    _set(target, value)
                layers[f"tensorly-torch, {implementation}"] = layer
        if tednet := MODULES["tednet"]:
            layer = importlib.import_module(f"{tednet.__name__}.tnn.tucker2").TK2Conv2D(
                channels, channels, list(reversed(core.shape[:2])), 3, padding=1, bias=False
            )
            nodes = [parameter for name, parameter in layer.named_parameters() if name.startswith("node")]
            _set(nodes[0], down.T)
            _set(nodes[1], up.T)
            _set(layer.kernel.weight, core)
            layers["tednet"] = layer
    return layers
