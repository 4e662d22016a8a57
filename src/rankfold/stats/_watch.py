"""The rows of layers' inputs while a model runs, seen by hooks at positions determined by a seed."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold._common import Arguments, batch_arguments, device_of, first_tensor, to_device, whole
from rankfold.errors import DataError
from rankfold.layers import Rows, row_size, rows_of
from rankfold.stats._moments import MEMORY, PATCHES
from rankfold.stats._walk import left_alone, uncompiled, walk

Mask = str | Callable[[Any], Tensor]
Loss = Callable[[Any, Any], Tensor]


class Request(NamedTuple):
    """What to do with every batch."""

    batches: int | None
    patches: int
    mask: Mask | None
    loss: Loss | None
    memory: int
    seed: int


class Batch(NamedTuple):
    """One batch: its number from 0, what the loader yielded, and the arguments of the call."""

    number: int
    value: Any
    arguments: Arguments


def check_request(request: Request, *, moments: bool) -> None:
    for name in ("batches", "patches", "memory"):
        value = getattr(request, name)
        if value is not None:
            whole(name, value, error=DataError)
    given = [name for name in ("batches", "mask", "loss") if getattr(request, name) is not None]
    if given and not moments:
        raise DataError(f"{given[0]}= has a meaning for moments only: add moments=True")


def mask_of(mask: Mask | None, batch: Batch) -> Tensor | None:
    """Return the mask of a batch as a bool tensor."""
    if mask is None:
        return None
    value = batch.arguments[1].get(mask) if isinstance(mask, str) else mask(batch.value)
    if not isinstance(value, Tensor):
        keys = ", ".join(map(repr, batch.arguments[1])) or "none"
        raise DataError(
            f"batch {batch.number}: mask={mask!r} gives {value!r:.80}, no tensor; keys of the batch: {keys}"
        )
    flags = value.bool()
    if value.dim() != 2 or not torch.equal(flags.to(value.dtype), value):
        raise DataError(
            f"batch {batch.number}: a mask is (batch, tokens), 1 or True where a token counts, and not of shape "
            f"{tuple(value.shape)} with values from {float(value.min())} to {float(value.max())}"
        )
    return flags


@contextmanager
def watching(
    layers: Mapping[str, nn.Module],
    see: Callable[[str, Rows], None],
    number: int,
    mask: Tensor | None,
    request: Request,
) -> Iterator[None]:
    """Pass the rows of every call of some layers to a function while one batch runs."""
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            source = first_tensor((args, kwargs))
            if source is None:
                return
            # Independent of the rest of the model, so that two models are seen at the same positions.
            seed = zlib.crc32(f"{request.seed}:{name}:{number}:{calls[name]}".encode())
            calls[name] += 1
            with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
                try:
                    if mask is None and not torch.isfinite(source).all():
                        raise DataError("NaN or Inf")
                    see(name, rows_of(layer, source, output, patches=request.patches, seed=seed, mask=mask))
                except DataError as error:
                    raise DataError(f"batch {number}: the input of layer {name!r} holds {error}") from error

        return watch

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


@contextmanager
def observing(
    model: nn.Module, names: Sequence[str], *, patches: int = PATCHES, mask: Mask | None = None, seed: int = 0
) -> Iterator[Callable[[Any], dict[str, Rows]]]:
    """Yield a function that runs a model on one batch and returns the rows of some of its layers, by name.

    The positions of patches depend on the seed, the name of the layer, the number of the batch within the `with` block
    and the number of the call in it. Two models observed with the same seed on the same batches are therefore seen at
    the same positions, as long as the shapes agree. Within the block the model is in eval mode and runs without
    gradients; afterwards its flags, its buffers and torch's random state are restored.

    Args:
        model: any module.
        names: names of linear layers or convolutions of the model, stock or factorised.
        patches: number of output positions of a convolution to return per image.
        mask: which tokens to return: the key of a tensor (batch, tokens) in mappings, such as "attention_mask", or a
            function of a batch that returns one.
        seed: seed for the positions.

    Raises:
        DataError: a name is not that of such a layer, or a batch has another form or leads to NaN or Inf in the input
            of a layer.

    Example:
        >>> with observing(nn.Sequential(nn.Linear(8, 4)), ["0"]) as run:
        ...     seen = run(torch.ones(5, 8))
        >>> seen["0"].inputs.shape, seen["0"].outputs.shape
        (torch.Size([1, 5, 8]), torch.Size([5, 4]))
    """
    found = dict(walk(model))
    unfit = [name for name in names if name not in found or row_size(found[name]) is None]
    if unfit:
        raise DataError(f"the model has no linear layer or convolution named {unfit[0]!r} to observe")
    layers = {name: found[name] for name in names}
    request = Request(None, patches, mask, None, MEMORY, seed)
    check_request(request, moments=True)
    device, number = device_of(model), 0

    def run(batch: Any) -> dict[str, Rows]:
        nonlocal number
        args, kwargs = to_device(batch_arguments(batch), device)
        seen: dict[str, list[Rows]] = defaultdict(list)
        flags = mask_of(mask, Batch(number, batch, (args, kwargs)))
        with watching(layers, lambda name, rows: seen[name].append(rows), number, flags, request):
            model(*args, **kwargs)
        number += 1
        return {
            name: Rows(torch.cat([r.inputs for r in rows], dim=1), torch.cat([r.outputs for r in rows]))
            for name, rows in seen.items()
        }

    with left_alone(model), uncompiled():
        yield run
