"""What a layer multiplies its weight with: the rows of a linear layer's input, the patches of a convolution's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.layers._dense import DenseType, dense_type_of, stock_type
from rankfold.layers._table import is_factorised
from rankfold.layers.conv._conv import ConvShape, padded

# Below float32 neither padding nor products of long rows are safe.
WIDER: Mapping[torch.dtype, torch.dtype] = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of a layer, and what it returned for them.

    For a layer with weight W and bias b, `outputs = inputs[g] @ W_g.flatten(1).T + b_g` side by side over its groups.

    Attributes:
        inputs: (groups, count, n), n = in/groups * kernel in the order of `weight.flatten(1)`; float32 or float64.
        outputs: (count, out), bias included, of the same type.
    """

    inputs: Tensor
    outputs: Tensor


def row_size(layer: nn.Module) -> tuple[int, int] | None:
    """Return (groups, n) of the rows of a layer, stock or factorised; None for a kind that has no such rows.

    Example:
        >>> row_size(nn.Linear(3, 4)), row_size(nn.Conv2d(4, 6, 3, groups=2)), row_size(nn.Embedding(3, 4))
        ((1, 3), (2, 18), None)
    """
    row = _dense_type(layer)
    if row is None or row.rows == "none" or row.fan_in is None:
        return None
    return int(getattr(layer, "groups", 1)), row.fan_in(layer)


def output_size(layer: nn.Module) -> int:
    """Return how many outputs a layer has, stock or factorised; 0 for a kind that `row_size` does not know.

    Example:
        >>> output_size(nn.Linear(3, 4)), output_size(nn.Conv2d(4, 6, 3, groups=2)), output_size(nn.ReLU())
        (4, 6, 0)
    """
    row = _dense_type(layer)
    return 0 if row is None or row.rows == "none" else int(getattr(layer, row.outputs))


def _dense_type(layer: Any) -> DenseType | None:
    """Return which dense layer a layer is or stands in for."""
    return stock_type(layer.dense_type) if is_factorised(layer) else dense_type_of(layer)


def _takes_patches(layer: nn.Module) -> bool:
    row = _dense_type(layer)
    return row is not None and row.rows == "patches"


def rows_of(
    layer: nn.Module, source: Tensor, output: Tensor, *, patches: int, seed: int, mask: Tensor | None = None
) -> Rows:
    """Return the inputs of one call of a layer as rows, and its outputs at the same positions.

    A linear layer has a row per vector of its input, those that the mask leaves. A convolution has `patches` rows per
    image, or all where there are no more: the raster of its output is cut into that many equal stretches and one
    position is drawn from each, anew for every image. The same seed and shapes give the same positions.

    Args:
        layer: a layer that `row_size` knows.
        source: its input.
        output: what it returned.
        patches: positions per image.
        seed: seed of the positions.
        mask: (batch, tokens), True where a token counts. It is applied to linear layers with inputs
            (batch, tokens, n) or (batch * tokens, n); the inputs of other layers count as a whole.
    """
    wide = WIDER.get(source.dtype, source.dtype)
    source, output = source.detach().to(wide), output.detach().to(WIDER.get(output.dtype, output.dtype))
    if _takes_patches(layer):
        return _patch_rows(ConvShape.of(layer), source, output, patches, seed)
    inputs, outputs = source.reshape(-1, source.shape[-1]), output.reshape(-1, output.shape[-1])
    chosen = _chosen_by(mask, source)
    # Copies in any case: the model may go on to change its tensors in place.
    inputs, outputs = (x.clone() if chosen is None else x[chosen] for x in (inputs, outputs))
    return Rows(inputs[None], outputs)


def output_rows(layer: nn.Module, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return all that has the shape of a layer's output as rows (count, out): those that the mask of `rows_of` leaves.

    Example:
        >>> output_rows(nn.Conv1d(2, 3, 1), torch.ones(4, 3, 5)).shape
        torch.Size([20, 3])
    """
    if _takes_patches(layer):
        channels = values.dim() - len(layer.kernel_size) - 1  # type: ignore[arg-type]
        return values.movedim(channels, -1).reshape(-1, values.shape[channels])
    chosen = _chosen_by(mask, values)
    rows = values.reshape(-1, values.shape[-1])
    return rows if chosen is None else rows[chosen]


def _chosen_by(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """Return which vectors of an input or output (…, n) a mask leaves; None where it has another shape."""
    if mask is None or values.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return None
    return mask.flatten().to(values.device)


def _patch_rows(shape: ConvShape, source: Tensor, output: Tensor, patches: int, seed: int) -> Rows:
    axes = len(shape.kernel_size)
    if source.dim() == axes + 1:  # a single image
        source, output = source[None], output[None]
    if any(shape.margins):
        source = padded(source, shape)
    images, size = source.shape[0], output.shape[2:]
    places = _places(images, size.numel(), patches, seed).to(source.device)
    index = _pixels(shape, places, size, source.shape[2:])
    found = source.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, shape.in_channels, -1))
    found = found.reshape(images, shape.groups, -1, places.shape[1], index.shape[2])
    inputs = found.permute(1, 0, 3, 2, 4).reshape(shape.groups, places.numel(), shape.fan_in)
    outputs = output.flatten(2).gather(2, places[:, None].expand(-1, output.shape[1], -1))
    return Rows(inputs, outputs.transpose(1, 2).reshape(places.numel(), -1))


def _places(images: int, positions: int, patches: int, seed: int) -> Tensor:
    """Return (images, count) positions of an output, flat: all of them, or one of each of `patches` stretches."""
    if patches >= positions:
        return torch.arange(positions).expand(images, -1)
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(images, patches, generator=generator, dtype=torch.float64)
    drawn = (torch.arange(patches) + within) * (positions / patches)
    return drawn.long().clamp_(max=positions - 1)


def _pixels(shape: ConvShape, places: Tensor, size: torch.Size, padded: torch.Size) -> Tensor:
    """Return (images, count, kernel) flat positions in the padded input under the kernel at each place."""
    total = torch.zeros(1, dtype=torch.long, device=places.device)
    step = 1
    for axis in reversed(range(len(size))):
        place, places = places % size[axis], places // size[axis]
        tap = torch.arange(shape.kernel_size[axis], device=places.device) * shape.dilation[axis]
        along = (place * shape.stride[axis])[..., None] + tap
        # The later axes vary fastest in the kernel, as in the weight.
        total = (along[..., :, None] * step + total[..., None, :]).flatten(-2)
        step *= padded[axis]
    return total
