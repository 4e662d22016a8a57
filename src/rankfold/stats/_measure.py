"""Measure a model on data: which layers are called, what each costs, and the moments of its inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from rankfold._common import (
    Arguments,
    batch_arguments,
    batch_target,
    device_of,
    example_arguments,
    first_tensor,
    to_device,
    track,
)
from rankfold.errors import DataError, LayerError
from rankfold.layers import Call, TiedHead, dense_cost, is_factorised, output_rows
from rankfold.stats._macs import Products
from rankfold.stats._moments import MEMORY, PATCHES, Sums, bytes_of
from rankfold.stats._stats import LayerStats, Stats
from rankfold.stats._walk import count_params, left_alone, uncompiled, walk
from rankfold.stats._watch import Batch, Loss, Mask, Request, check_request, mask_of, watching


def measure(  # noqa: PLR0913
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example: Any = None,
    moments: bool = False,
    batches: int | None = None,
    patches: int = PATCHES,
    mask: Mask | None = None,
    loss: Loss | None = None,
    memory: int = MEMORY,
    seed: int = 0,
) -> Stats:
    """Run a model on data and return its layers, what they cost and, on request, the moments of their inputs.

    The model runs in eval mode without gradients. Its training flags, its buffers and torch's random state are
    restored, even after an interruption. Calls and MACs are those of the first batch, and MACs are divided by the batch
    size (the first dimension of the first tensor of the input). The MACs of the model are those of its operators or the
    sum over its layers, whichever is larger; operators without a formula are named in `Stats.uncounted`.

    With `moments`, all batches run through the model, and the means of x and of `x x^T` over the inputs x of every
    linear layer and convolution are taken: products of at most 8192 rows in float32 (float64 for float64 inputs),
    summed in float64. Nothing else of the data is kept.

    Args:
        model: any module.
        loader: an iterable of batches: tensors, tuples with the inputs first, or mappings of keyword arguments. Without
            `moments` only the first one is read.
        example: instead of a loader, the arguments of one call: a tensor, a tuple or a mapping.
        moments: whether to read the whole loader and take the moments of the layers' inputs.
        batches: largest number of batches to read; all of them if None, for which the loader must end.
        patches: number of output positions of a convolution that are counted per image, 32 by default: one is drawn
            from each of as many equal parts of the raster, again for each image and layer; all if there are fewer.
        mask: which tokens to count, so that padding is left out: the key of a tensor in mappings, such as
            "attention_mask", or a function of a batch. The tensor is (batch, tokens), True or 1 where a token counts.
            It applies to linear layers whose inputs are (batch, tokens, n) or (batch * tokens, n).
        loss: a function of the model's output and the batch's target (what follows the inputs, or is under "labels")
            that returns the mean loss over a batch. The moments then include the mean squared gradient of a sample's
            loss in each output of a layer, the diagonal of its Fisher information.
        memory: bytes for all second moments together, 2 GiB by default; a layer with n inputs takes 8 n^2. The smallest
            layers come first, and those that do not fit are listed in `left_out`. The rows of a layer that wait to be
            multiplied take at most half as much again, or as much as those of one call.
        seed: seed for the positions of patches.

    Raises:
        DataError: neither or both of loader and example are given, the loader is empty, a batch is empty, has another
            form or leads to NaN or Inf in the input of a layer, or an argument has no effect without `moments`.
        LayerError: a lazy layer has no shape yet.

    Example:
        >>> import torch, rankfold
        >>> stats = rankfold.measure(torch.nn.Linear(8, 4), example=torch.ones(2, 8))
        >>> stats.params, stats.macs, stats.batch_size
        (36, 32, 2)
        >>> rankfold.measure(torch.nn.Linear(8, 4), [torch.randn(9, 8)], moments=True).layers[""].moments.count
        9
    """
    if (loader is None) == (example is None):
        raise DataError("give either a loader or example=, and not both")
    request = Request(batches, patches, mask, loss, memory, seed)
    check_request(request, moments=moments)
    _refuse_lazy(model)
    layers = dict(walk(model))
    with left_alone(model), uncompiled():
        found = _read(loader, example, device_of(model))
        first = next(found, None)
        if first is None:
            raise DataError("the loader is empty: it must yield at least one batch")
        stats = _first_pass(model, layers, first.arguments)
        if not moments:
            return stats
        total = batches if batches is not None else _length(loader)
        rest = islice(chain([first], found), batches)
        sums, left_out = _affordable(layers, memory)
        for batch in track(rest, "Measuring inputs", total=total):
            _add_batch(model, {name: layers[name] for name in sums}, sums, batch, request)
    return _with_moments(stats, sums, left_out)


def _read(loader: Iterable[Any] | None, example: Any, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of a loader, or an example as the only batch, checked and on the device."""
    if loader is None:
        yield Batch(0, None, to_device(example_arguments(example), device))
        return
    for number, batch in enumerate(loader):
        try:
            arguments = to_device(batch_arguments(batch), device)
        except DataError as error:
            raise DataError(f"batch {number}: {error}") from error
        source = first_tensor(arguments)
        if source is not None and not source.numel():
            raise DataError(f"batch {number} is empty: its first tensor is of shape {tuple(source.shape)}")
        yield Batch(number, batch, arguments)


def _length(loader: Iterable[Any] | None) -> int | None:
    """Return the number of batches of a loader if it knows."""
    with suppress(TypeError):  # from a DataLoader of an IterableDataset
        return len(loader) if isinstance(loader, Sized) else None
    return None


def _first_pass(model: nn.Module, layers: Mapping[str, nn.Module], arguments: Arguments) -> Stats:
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    counter = Products()
    args, kwargs = arguments
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_recorder(calls[name]), with_kwargs=True).remove)
        # Layers whose hooks would miss a merged stage run stage by stage: that is the work that is counted.
        stack.callback(register_module_forward_pre_hook(_see).remove)
        stack.enter_context(counter)
        model(*args, **kwargs)
    batch_size = _batch_size(arguments)
    # Still in eval mode: in train mode a spectral norm would take a step whenever the weight is read.
    measured = {name: _layer_stats(layer, tuple(calls[name]), batch_size) for name, layer in layers.items()}
    macs = max(counter.macs // batch_size, sum(layer.macs for layer in measured.values()))
    uncounted = tuple(sorted(counter.unknown))
    if uncounted:
        warnings.warn(
            f"the multiply-adds of {', '.join(uncounted)} are not counted, since no formula gives them: budgets and "
            "reports of MACs leave them out",
            stacklevel=3,
        )
    return Stats(measured, count_params(model), macs, batch_size, uncounted=uncounted)


def _affordable(layers: Mapping[str, nn.Module], memory: int) -> tuple[dict[str, Sums], dict[str, str]]:
    """Return empty sums for the layers that fit into the memory, and why the others have none."""
    sizes = {name: bytes_of(layer) for name, layer in layers.items()}
    left_out = {
        name: f"a {type(layers[name]).__name__} has no rows of inputs" for name in layers if sizes[name] is None
    }
    sums, taken = {}, 0
    for name, size in sorted(((name, size) for name, size in sizes.items() if size is not None), key=lambda x: x[1]):
        if taken + size > memory:
            left_out[name] = (
                f"its second moment takes {size:,} bytes, and of memory={memory:,} {memory - taken:,} are left"
            )
            continue
        sums[name], taken = Sums(), taken + size
    return sums, left_out


def _with_moments(stats: Stats, sums: Mapping[str, Sums], left_out: Mapping[str, str]) -> Stats:
    found = {name: total.moments() for name, total in sums.items()}
    unseen = {name: "none of its inputs was counted" for name, moments in found.items() if moments is None}
    layers = {name: replace(layer, moments=found.get(name)) for name, layer in stats.layers.items()}
    return replace(stats, layers=layers, left_out={**left_out, **unseen})


def _add_batch(
    model: nn.Module, layers: Mapping[str, nn.Module], sums: Mapping[str, Sums], batch: Batch, request: Request
) -> None:
    """Run the model on a batch and add the inputs of its layers to their sums."""
    mask = mask_of(request.mask, batch)
    args, kwargs = batch.arguments
    with ExitStack() as stack:
        stack.enter_context(watching(layers, lambda name, rows: sums[name].add(rows), batch.number, mask, request))
        if request.loss is None:
            model(*args, **kwargs)
            return
        outputs: list[tuple[str, Tensor]] = []
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_keeper(name, outputs)).remove)
        with torch.enable_grad():
            value = _loss_of(request.loss, model(*args, **kwargs), batch)
            gradients = torch.autograd.grad(value, [output for _, output in outputs], allow_unused=True)
    for (name, output), gradient in zip(outputs, gradients, strict=True):
        found = torch.zeros_like(output) if gradient is None else gradient
        sums[name].add_gradients(output_rows(layers[name], found, mask), _batch_size(batch.arguments))


def _keeper(name: str, outputs: list[tuple[str, Tensor]]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that keeps the output of a layer and passes on a copy, which may be changed in place."""

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept = output if output.requires_grad else output.detach().requires_grad_()
        outputs.append((name, kept))
        return kept.clone()

    return keep


def _loss_of(loss: Loss, output: Any, batch: Batch) -> Tensor:
    value = loss(output, to_device(batch_target(batch.value), _device_of(output)))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError(f"batch {batch.number}: loss= must return a tensor of one number, got {value!r:.80}")
    if not value.requires_grad:
        raise DataError(f"batch {batch.number}: the loss does not depend on any measured layer of the model")
    if not torch.isfinite(value).all():
        raise DataError(f"batch {batch.number}: the loss is {float(value.detach())}")
    return value.reshape(())


def _device_of(output: Any) -> torch.device:
    first = first_tensor(output)
    return torch.device("cpu") if first is None else first.device


def _refuse_lazy(model: nn.Module) -> None:
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise LayerError(
            f"parameter {lazy!r} of a lazy layer has no shape yet and measuring would initialise it: "
            "call the model on a batch first"
        )


def _see(_: nn.Module, __: Any) -> None:
    """Do nothing: that there is a hook on all modules is what counts."""


def _recorder(calls: list[Call]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source, result = first_tensor((args, kwargs)), first_tensor(output)
        if source is not None and result is not None:
            calls.append(Call(tuple(source.shape), tuple(result.shape)))

    return record


def _batch_size(arguments: Arguments) -> int:
    first = first_tensor(arguments)
    return max(1, first.shape[0]) if first is not None and first.dim() else 1


def _layer_stats(layer: nn.Module, calls: tuple[Call, ...], batch_size: int) -> LayerStats:
    return LayerStats(type(layer).__name__, count_params(layer), _macs(layer, calls) // batch_size, calls)


def _macs(layer: nn.Module, calls: tuple[Call, ...]) -> int:
    """Return the multiply-adds of all calls; 0 for a kind of layer whose cost is not known (it is never replaced)."""
    if isinstance(layer, TiedHead):
        return layer.macs(calls)
    if is_factorised(layer):
        # A copy on the meta device: costs depend on shapes only.
        twin: Any = copy.deepcopy(layer).to("meta")
        return int(type(twin).cost(twin.to_dense(), calls, rank=twin.rank, **twin.options).macs)
    return dense_cost(layer, calls).macs if isinstance(getattr(layer, "weight", None), Tensor) else 0
