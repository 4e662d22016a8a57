"""Block distillation: the blocks of a compressed model are trained one by one to match those of the original."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rankfold._common import (
    batch_arguments,
    device_of,
    evaluating,
    first_tensor,
    near,
    one_of,
    real,
    to_device,
    track,
    whole,
)
from rankfold.errors import DataError, RankfoldError
from rankfold.layers import is_factorised
from rankfold.train._checkpoint import restore, snapshot
from rankfold.train._fit import trained_groups
from rankfold.train._recipe import STANDARD, Recipe

USED = ("optimizer", "schedule", "warmup", "only", "weight_decay", "clip", "seed", "progress")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
INPUTS = ("student", "teacher")

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BlockFit:
    """The result for one block: relative errors of its outputs over all batches; `after` is never above `before`."""

    name: str
    before: float
    after: float
    steps: int
    seconds: float


def distil_blocks(  # noqa: PLR0913
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    blocks: Sequence[str] | None = None,
    epochs: int = 2,
    lr: float = 1e-3,
    inputs: str = "student",
    recipe: Recipe = STANDARD,
) -> tuple[BlockFit, ...]:
    """Train a model in place, block by block, to match the outputs of the teacher's blocks of the same names.

    Minimises `||f_t(x) - f_s(x')||^2 / ||f_t(x)||^2` for each block in the order in which they are called. x' is the
    input of the student's block after the blocks before it have been trained, so each block also corrects the errors
    that they leave. No labels are used, and gradients flow through one block only. A block whose error does not
    decrease keeps its weights. The inputs and outputs of one block over all batches are held in memory, and both
    models run over the data once per block.

    Args:
        model: the student; it is trained on its own device and in eval mode, so BatchNorm keeps its statistics.
        teacher: the dense original; it is not changed.
        loader: batches: tensors, tuples (inputs first) or dicts (keyword arguments); they are read once and kept, and
            targets are not used.
        blocks: names of modules that both models have and call; by default the modules that contain factorised
            layers, or the layers themselves if they are directly in the model or in a plain container.
        epochs: passes over the batches for each block.
        lr: highest learning rate.
        inputs: "student", or "teacher" to train each block on the teacher's inputs x, independently of the others.
        recipe: optimiser, schedule, warm-up, clipping, weight decay, seed, and which weights of a block to train.

    Returns:
        One row per block.

    Raises:
        DataError: the loader is empty, or is an iterator, which may never end.
        RankfoldError: a setting is out of range or has no effect here, a block is missing or not called, the outputs
            of two blocks differ in shape, or the loss is NaN or Inf. After this or any other exception the block being
            trained has its old weights.

    Reference:
        Bai, Wu, King, Lyu 2020 (few-shot distillation, cross inputs); Li et al. 2020 (block-wise).

    Example:
        >>> import rankfold as rf
        >>> teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> small, _ = rf.compress(teacher, example=torch.ones(1, 16), budget=rf.Budget(params=0.5))
        >>> rows = distil_blocks(small, teacher, [torch.randn(32, 16) for _ in range(4)], epochs=4)
        >>> all(row.after <= row.before for row in rows)
        True
    """
    data = _checked(loader, epochs, lr, inputs, recipe)
    named, taught = dict(model.named_modules()), dict(teacher.named_modules())
    names = list(blocks) if blocks is not None else _owners(model)
    for name in names:
        if name not in named or name not in taught:
            raise RankfoldError(f"the models have no block {name!r} in common{near(name, named)}")
    rows = []
    with evaluating(model, teacher):
        ordered = _call_order(model, {name: named[name] for name in names}, data[0])
        for name in track(ordered, "Distilling", show=recipe.progress):
            wanted = _recorded(teacher, taught[name], data)
            given = wanted if inputs == "teacher" else _recorded(model, named[name], data)
            samples = _samples(name, given, wanted, device_of(model))
            rows.append(_train(name, named[name], samples, epochs, lr, recipe))
    return tuple(rows)


def _checked(loader: Iterable[Any], epochs: int, lr: float, inputs: str, recipe: Recipe) -> list[Any]:
    whole("epochs", epochs)
    real("lr", lr, ends="()")
    one_of("inputs", inputs, INPUTS)
    unused = [f.name for f in fields(recipe) if f.name not in USED and getattr(recipe, f.name) != f.default]
    if unused:
        raise RankfoldError(f"Recipe({unused[0]}=…) has no meaning for blocks: leave it out, or use fit")
    if isinstance(loader, Tensor | Iterator):
        raise DataError(f"loader must be a DataLoader or a list of batches, which ends, got a {type(loader).__name__}")
    data = list(loader)
    if not data:
        raise DataError("the loader is empty: it must yield at least one batch")
    return data


def _owners(model: nn.Module) -> list[str]:
    """Return the modules that contain factorised layers, without those inside other such modules."""
    named = dict(model.named_modules())
    found = []
    for name, module in named.items():
        if is_factorised(module):
            owner = name.rpartition(".")[0]
            found.append(name if not owner or isinstance(named[owner], CONTAINERS) else owner)
    unique = dict.fromkeys(found)
    return [name for name in unique if not any(name.startswith(f"{other}.") for other in unique)]


def _call_order(model: nn.Module, blocks: dict[str, nn.Module], batch: Any) -> list[str]:
    if not blocks:
        raise RankfoldError("the model has no factorised layer: say which blocks= to distil")
    order: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, __, name=name: order.setdefault(name))
        for name, module in blocks.items()
    ]
    with _removed(hooks), torch.no_grad():
        _run(model, batch)
    missing = [name for name in blocks if name not in order]
    if missing:
        raise RankfoldError(f"block {missing[0]!r} is not called on this data: leave it out")
    return list(order)


@contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, batch: Any) -> None:
    args, kwargs = to_device(batch_arguments(batch), device_of(model))
    model(*args, **kwargs)


def _recorded(model: nn.Module, block: nn.Module, data: Sequence[Any]) -> list[tuple[Call, Tensor | None]]:
    """Return the arguments of all calls of a block, and the first tensor that each returned.

    They are copied, because later modules may change them in place.
    """
    given: list[Call] = []
    returned: list[Tensor | None] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(tree_map_only(Tensor, Tensor.clone, (args, kwargs)))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        result = first_tensor(output)
        returned.append(None if result is None else result.clone())

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    with _removed(hooks), torch.no_grad():
        for batch in data:
            _run(model, batch)
    return list(zip(given, returned, strict=True))


def _samples(
    name: str,
    given: Sequence[tuple[Call, Tensor | None]],
    wanted: Sequence[tuple[Call, Tensor | None]],
    device: torch.device,
) -> list[tuple[Call, Tensor]]:
    """Return the arguments of each call, on the student's device, with the output that it should return."""
    samples = []
    for (call, output), (_, target) in zip(given, wanted, strict=True):
        if output is None or target is None or output.shape != target.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (output, target)]
            raise RankfoldError(f"block {name!r} returns {shapes[0]}, and the teacher's {shapes[1]}: choose another")
        samples.append((to_device(call, device), to_device(target, device)))
    return samples


def _train(
    name: str, block: nn.Module, samples: Sequence[tuple[Call, Tensor]], epochs: int, lr: float, recipe: Recipe
) -> BlockFit:
    """Train one block, and restore its old weights if it did not improve."""
    began, before, old = time.perf_counter(), _error(block, samples), snapshot(block)
    groups = trained_groups(block, recipe.weight_decay, recipe.only)
    steps = 0
    done = False
    try:
        if groups and before > 0:
            steps = _descend(name, block, samples, epochs, recipe, recipe.build_optimizer(groups, lr))
        after = _error(block, samples)
        done = after < before
    finally:
        if not done:
            restore(block, old)
    return BlockFit(name, before, after if done else before, steps, time.perf_counter() - began)


def _descend(
    name: str,
    block: nn.Module,
    samples: Sequence[tuple[Call, Tensor]],
    epochs: int,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take one step per call in each epoch, shuffled every epoch; return the number of steps."""
    scale = sum(float(target.double().square().sum()) for _, target in samples) / len(samples) or 1.0
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(recipe.seed)
    order = [int(k) for _ in range(epochs) for k in torch.randperm(len(samples), generator=generator)]
    with torch.enable_grad():
        for step, chosen in enumerate(order):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * recipe.factor((step + 0.5) / len(order))
            call, target = samples[chosen]
            loss = (_output(block, call) - target).float().square().sum() / scale
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise RankfoldError(
                    f"block {name!r}: the loss or its gradient is NaN or Inf, step {step + 1}: lower lr"
                )
            optimizer.step()
            optimizer.zero_grad()
    return len(order)


def _output(block: nn.Module, call: Call) -> Tensor:
    result = first_tensor(block(*call[0], **call[1]))
    if result is None:
        raise RankfoldError(f"a {type(block).__name__} returns no tensor: choose another block")
    return result


@torch.no_grad()
def _error(block: nn.Module, samples: Sequence[tuple[Call, Tensor]]) -> float:
    """Return the relative error of a block's outputs over all calls."""
    wrong = sum(float((_output(block, call) - target).double().square().sum()) for call, target in samples)
    whole = sum(float(target.double().square().sum()) for _, target in samples)
    if not math.isfinite(wrong):
        return math.inf
    return math.sqrt(wrong / whole) if whole else math.sqrt(wrong)
