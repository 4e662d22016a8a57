"""What all layers share when they are built: empty stages, fresh values, what is kept of the dense layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankfold.errors import LayerError
from rankfold.layers._contract import Rank
from rankfold.layers._dense import dense_type_of

Device = torch.device | str | int | None
L = TypeVar("L", bound=nn.Module)
LARGEST_MERGE = 2**24
"""Entries that merged stages or cores may have: a larger dense weight is never rebuilt in a forward pass."""
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the order of the kernel


def check_type(owner: type[nn.Module], dense: nn.Module, expected: type[nn.Module]) -> None:
    """Raise a `LayerError` unless `dense` is exactly of the stock type that `owner` stands in for."""
    if type(dense) is not expected:
        raise LayerError(f"{owner.__name__} stands in for nn.{expected.__name__}, not for {type(dense).__name__}")


def place(module: L, device: Device) -> L:
    """Move a module made on the meta device to `device` (default: torch's), with storage but no values."""
    where = torch.get_default_device() if device is None else device
    # what Module.to_empty does, less half a second of imports that empty_like asks for on the meta device
    placed: L = module._apply(  # type: ignore[no-untyped-call]
        lambda values: torch.empty(values.shape, dtype=values.dtype, device=where)
    )
    return placed


def take_over(layer: L, dense: nn.Module) -> L:
    """Give `layer` the training mode of `dense` and the requires_grad of its weight and bias."""
    bias = getattr(dense, "bias", None)
    for name, parameter in layer.named_parameters():
        source = bias if name.rpartition(".")[2] == "bias" else dense.weight
        parameter.requires_grad_(bool(getattr(source, "requires_grad", True)))
    return layer.train(dense.training)


def is_channels_last(kernel: Tensor) -> bool:
    """Tell whether a kernel (out, in, space…) with two or three spatial axes is stored with the channels last.

    With a single input channel it is contiguous in both formats, and torch goes by the strides; a 1x1 kernel does not
    tell.
    """
    return kernel.dim() in CHANNELS_LAST and math.prod(kernel.shape[2:]) > 1 and kernel.stride(1) == 1


def in_channels_last(kernel: Tensor) -> Tensor:
    """Return a kernel with two or three spatial axes in the channels-last format."""
    if (
        kernel.shape[1] == 1
    ):  # contiguous in both formats: `contiguous` would leave it as it is, and torch take it for the other
        return kernel.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)
    return kernel.contiguous(memory_format=CHANNELS_LAST[kernel.dim()])


def laid_as(layer: L, kernels: Sequence[Tensor]) -> L:
    """Store the convolutions of a layer in the channels-last format if any of these kernels is."""
    if any(map(is_channels_last, kernels)):
        for stage in layer.modules():
            row = dense_type_of(stage)
            if row is not None and row.rows == "patches" and row.axes + 2 in CHANNELS_LAST:
                stage.to(memory_format=CHANNELS_LAST[row.axes + 2])
    return layer


def hollow(owner: type[L], dense: Any, arguments: Mapping[str, Any], device: Device) -> L:
    """Return an empty layer to take the place of `dense`, on its device unless another is given.

    It is built on the meta device, so that no random numbers are drawn. Kernels have the memory format of `dense`.
    """
    layer = owner(**arguments, device="meta", dtype=dense.weight.dtype)
    layer = take_over(place(layer, dense.weight.device if device is None else device), dense)
    return laid_as(layer, [dense.weight])


def copy_(target: Tensor | None, value: Tensor | None) -> None:
    """Copy a value into a parameter, outside autograd; does nothing where either is None, as for a missing bias."""
    if target is not None and value is not None:
        with torch.no_grad():
            target.copy_(value)


def fill(dense: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Fill the weight and the bias of a stock layer."""
    copy_(dense.weight, weight)
    copy_(getattr(dense, "bias", None), bias)


def finite_weight(owner: type[nn.Module], dense: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the weight of `dense` in `dtype` or wider; raise a `LayerError` if it cannot be decomposed."""
    weight: Tensor = dense.weight.detach()  # type: ignore[operator]
    where = f"{owner.__name__}: the weight of {type(dense).__name__}{tuple(weight.shape)}"
    if weight.is_meta:
        raise LayerError(f"{where} is on the meta device and has no values; use `like` for a fresh layer")
    if not weight.is_floating_point():
        raise LayerError(f"{where} is {weight.dtype}; only real floating-point weights are decomposed")
    if not bool(torch.isfinite(weight).all()):
        raise LayerError(f"{where} holds NaN or Inf; repair or retrain it before decomposing")
    return weight.to(torch.promote_types(weight.dtype, dtype))


def fresh_uniform_(weights: Sequence[Tensor], gain: float, generator: torch.Generator | None) -> None:
    """Fill the weights of a chain so that white input of variance 1 comes out with variance `gain`.

    Each stage of fan-in n gets the variance gain^(1/stages) / n, so that the variance changes from 1 to `gain` in equal
    steps. Values are drawn on the CPU, so that a seed gives the same ones on every device.
    """
    for weight in weights:
        if weight.is_meta:
            continue
        fan_in = weight[0].numel()
        bound = math.sqrt(3 * gain ** (1 / len(weights)) / fan_in)
        copy_(weight, torch.empty(weight.shape, device="cpu").uniform_(-bound, bound, generator=generator))


def rescale_(weights: Sequence[Tensor], squared_norm: Tensor, target: float) -> None:
    """Scale all weights of a chain by one factor so that the squared norm of their product is exactly `target`.

    Products of few random numbers scatter widely (rank 1, a depthwise kernel of three taps); this gives every draw, and
    not only the average one, the variance of a dense layer.
    """
    if squared_norm.is_meta or not bool(squared_norm > 0):
        return
    factor = (target / float(squared_norm)) ** (0.5 / len(weights))
    for weight in weights:
        copy_(weight, weight.detach() * factor)


def fresh_bias_(bias: Tensor | None, fan_in: int, generator: torch.Generator | None) -> None:
    """Fill a bias as torch does: uniform within ±1/sqrt(fan_in)."""
    if bias is not None and not bias.is_meta:
        bound = 1 / math.sqrt(fan_in)
        copy_(bias, torch.empty(bias.shape, device="cpu").uniform_(-bound, bound, generator=generator))


def seeded(seed: int) -> torch.Generator:
    """Return a new generator, which leaves the global one alone."""
    return torch.Generator().manual_seed(seed)


def named(rank: Rank, options: dict[str, Any]) -> str:
    """Return `rank=…, option=…` for a repr."""
    return ", ".join(f"{name}={value!r}" for name, value in {"rank": rank, **options}.items())
