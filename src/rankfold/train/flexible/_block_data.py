"""What a block of a network computes: its stages, its inputs on real data, its values and Jacobians there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rankfold._common import batch_arguments, device_of, evaluating, to_device
from rankfold.errors import DataError, LayerError
from rankfold.layers import FlexibleLayer, block_class, pointwise_twin, stock_twin
from rankfold.planning import block_modules, layer_refusal, structural_refusals
from rankfold.surgery import NORMS, folded

FEWEST_BATCHES = 8  # a batch contributes at most 1/8 of the samples
AGREEMENT = 1e-3  # relative difference of outputs that float32 rounding can explain


@dataclass(frozen=True, eq=False)
class Block:
    """A block as a chain of linear layers with pointwise functions between them, in float64.

    A convolution of kernel 1 counts as a linear layer of the channels at one position.

    Attributes:
        stages: copies of the model's modules: `nn.Linear` layers and pointwise functions.
        source: the first layer as it is in the model.
        kind: the class of the layer that can replace the block.
    """

    stages: tuple[nn.Module, ...]
    source: Any
    kind: type[FlexibleLayer]

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers."""
        return [stage for stage in self.stages if isinstance(stage, nn.Linear)]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the values (samples, out) at inputs (samples, in)."""
        with torch.no_grad():
            for stage in self.stages:
                inputs = stage(inputs)
        return inputs

    @property
    def axis(self) -> int:
        """The dim of the model's tensors that the layers act on, counted from the end."""
        return int(getattr(self.kind, "channels", -1))

    def rows(self, inputs: Tensor) -> Tensor:
        """Return the block's input in the model as rows (samples, in): of images, the channels at each position."""
        moved = inputs.movedim(self.axis, -1)
        return moved.reshape(-1, moved.shape[-1])

    def replay(self, inputs: Tensor) -> Tensor:
        """Return the output of the block for its input in the model, in the dtype of the input."""
        moved = inputs.movedim(self.axis, -1)
        values = self(self.rows(inputs).double()).to(inputs.dtype)
        return values.reshape(*moved.shape[:-1], -1).movedim(-1, self.axis)

    def slopes(self, inputs: Tensor) -> list[Tensor | None]:
        """Return the derivatives (samples, width) of each pointwise stage; None for a linear layer."""
        found: list[Tensor | None] = []
        for stage in self.stages:
            if isinstance(stage, nn.Linear):
                inputs = stage(inputs).detach()
                found.append(None)
                continue
            with torch.enable_grad():
                at = inputs.detach().requires_grad_()
                outputs = stage(at)
                (slope,) = torch.autograd.grad(outputs.sum(), at)
            inputs = outputs.detach()
            found.append(slope)
        return found

    def jacobians(self, inputs: Tensor, directions: Tensor) -> Tensor:
        """Return `J_i P` (samples, out, columns) for directions P (in, columns)."""
        product = directions  # the same for all samples up to the first activation
        for stage, slope in zip(self.stages, self.slopes(inputs), strict=True):
            product = slope[..., None] * product if slope is not None else _weight(stage) @ product
        return product.expand(len(inputs), *product.shape[-2:])

    def probes(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return `R J_i` (samples, rows, in) for rows R (rows, out)."""
        product = rows
        pairs = list(zip(self.stages, self.slopes(inputs), strict=True))
        for stage, slope in reversed(pairs):
            product = product * slope[:, None] if slope is not None else product @ _weight(stage)
        return product.expand(len(inputs), *product.shape[-2:])


def _weight(stage: nn.Module) -> Tensor:
    weight: Tensor = stage.weight  # type: ignore[assignment]
    return weight.detach()


def read_block(model: nn.Module, name: str) -> Block:
    """Return a block of a model after checking that it is linear layers with pointwise functions between them.

    A BatchNorm after a linear layer or a convolution is merged into it, as in eval mode.

    Raises:
        PlanError: the model has no such block.
        LayerError: one of its modules is neither linear nor pointwise, or cannot be replaced.
    """
    modules = block_modules(model, name)
    refused = structural_refusals(model)
    stages: list[nn.Module] = []
    for key, module in modules.items():
        if key in (next(iter(modules)), name.partition(":")[2]) and not _has_weight(module):
            raise LayerError(
                f"block {name!r}: it begins and ends with a linear layer or a convolution of kernel 1, not with a "
                f"{_kind(module)}"
            )
        if type(module) in NORMS:
            stages[-1] = _normalised(name, key, module, stages[-1])
        elif _has_weight(module):
            stages.append(_linear_stage(name, key, module, refused.get(key), _width(stages)))
        else:
            _check_pointwise(name, key, module, _width(stages) or 0)
            stages.append(copy.deepcopy(module).double().eval().requires_grad_(False))
    first, last = (stock_twin(modules[key]) for key in (next(iter(modules)), name.partition(":")[2]))
    try:
        kind = block_class(first, last, FlexibleLayer.method)
        _check_one_kind(modules, first)
    except LayerError as problem:
        raise LayerError(f"block {name!r}: {problem}") from problem
    return Block(tuple(stages), next(iter(modules.values())), kind)


def _has_weight(module: nn.Module) -> bool:
    """Tell whether a module must be linear to be in a block: it has parameters and is neither activation nor norm."""
    activation = isinstance(module, nn.PReLU) and module.num_parameters == 1
    return type(module) not in NORMS and not activation and next(module.parameters(recurse=False), None) is not None


def _linear_stage(block: str, name: str, module: nn.Module, reason: str | None, width: int | None) -> nn.Module:
    """Return a linear layer, or a convolution of kernel 1, as a new linear layer in float64."""
    reason = reason or layer_refusal(name, module)
    try:
        if reason:
            raise LayerError(reason)
        twin = pointwise_twin(stock_twin(module))
    except LayerError as problem:
        raise LayerError(f"block {block!r}: {name!r} ({_kind(module)}) can't be part of it: {problem}") from problem
    if width not in (None, twin.in_features):
        raise LayerError(
            f"block {block!r}: {name!r} ({_kind(module)}) takes {twin.in_features} features or channels, and the layer "
            f"before it gives {width}"
        )
    return copy.deepcopy(twin).double().eval().requires_grad_(False)


def _width(stages: Sequence[nn.Module]) -> int | None:
    """Return the number of output features of the last linear layer; None if there is none yet."""
    linears = [stage for stage in stages if isinstance(stage, nn.Linear)]
    return linears[-1].out_features if linears else None


def _normalised(block: str, name: str, norm: Any, before: nn.Module) -> nn.Module:
    """Return a linear layer with the BatchNorm after it merged into it."""
    if not isinstance(before, nn.Linear) or norm.num_features != before.out_features:
        raise LayerError(
            f"block {block!r}: {name!r} ({_kind(norm)}) does not come right behind a linear layer or a convolution of "
            "its size, of which it could be a part: choose a block without it"
        )
    if norm.running_mean is None or norm.running_var is None:
        raise LayerError(
            f"block {block!r}: {name!r} ({_kind(norm)}) has no running statistics, and normalises every batch by "
            "itself: neither this nor rankfold.fold_batchnorm can make it part of a layer; train it with "
            "track_running_stats=True"
        )
    return folded(before, norm).requires_grad_(False)


def _check_one_kind(modules: dict[str, nn.Module], first: nn.Module) -> None:
    """Raise unless all layers of a block act along the same dim."""
    for key, module in modules.items():
        if _has_weight(module) and type(stock_twin(module)) is not type(first):
            raise LayerError(f"{key!r} is a {_kind(module)} and the first layer a {_kind(first)}")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _check_pointwise(block: str, name: str, module: nn.Module, width: int) -> None:
    """Raise unless each output of a module depends on the input at the same place only, by the same function."""
    pointwise = copy.deepcopy(module).double().eval()
    at = torch.linspace(-3, 3, 4 * width, dtype=torch.float64, device=device_of(module)).reshape(4, width)
    half = max(1, width // 2)
    try:
        with torch.no_grad():
            whole, part = pointwise(at), pointwise(at[:2, :half].flip(1))
            same = part.shape == (2, half) and torch.allclose(whole[:2, :half].flip(1), part, rtol=1e-6, atol=1e-9)
    except (RuntimeError, TypeError, ValueError, IndexError):
        same = False
    if not same:
        raise LayerError(
            f"block {block!r}: {name!r} ({_kind(module)}) is no pointwise function, so that its neurons do not act "
            "one by one: choose a block of linear layers, or convolutions of kernel 1, with activations between them"
        )


def sample_inputs(model: nn.Module, name: str, data: Iterable[Any], block: Block, samples: int, seed: int) -> Tensor:
    """Return at most `samples` rows (rows, in) of the block's input on the data, in float64.

    For a convolution, a row is the channels at one position; positions are drawn at random from the images of each
    batch. The first batch is also used to check that the block is a chain: its last module must return what the stages
    compute, and the model's outputs must not change if the first module returns that and the others pass it on.

    Raises:
        DataError: there is no batch, or the rows contain NaN or Inf.
        LayerError: the block branches, or something is computed between its modules.
    """
    if isinstance(data, Tensor):
        raise DataError("data must be an iterable of batches, such as a DataLoader or a list of tensors, got a tensor")
    generator = torch.Generator().manual_seed(seed)
    modules = list(block_modules(model, name).values())
    rows: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in data:
            arguments = to_device(batch_arguments(batch), device_of(model))
            seen = _inputs_of(model, modules[0], arguments)
            if not seen:
                raise LayerError(f"block {name!r}: its first module is not called on this data")
            found = torch.cat([block.rows(one.detach()) for one in seen])
            _check_finite(name, found)
            if not rows:
                _check_chain(model, name, modules, block, arguments)
            chosen = torch.randperm(len(found), generator=generator)[: max(1, samples // FEWEST_BATCHES)]
            rows.append(found[chosen.to(found.device)].double())
            if sum(map(len, rows)) >= samples:
                break
    if not rows:
        raise DataError(f"block {name!r}: data yields no batch (an iterator can be used only once)")
    return torch.cat(rows)[:samples]


def _check_finite(name: str, rows: Tensor) -> None:
    bad = int((~torch.isfinite(rows)).any(1).sum())
    if bad:
        raise DataError(
            f"block {name!r}: {bad} of {len(rows)} inputs of a batch hold NaN or Inf: repair the data or the model"
        )


def _inputs_of(model: nn.Module, module: nn.Module, arguments: Any) -> list[Tensor]:
    """Return the inputs of a module, one per call."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
        model(*arguments[0], **arguments[1])
    return seen


def _check_chain(model: nn.Module, name: str, modules: Sequence[nn.Module], block: Block, arguments: Any) -> None:
    """Raise unless the model's outputs stay the same when the first module computes the whole block."""
    args, kwargs = arguments
    wanted = _tensors(model(*args, **kwargs))
    first, *rest = modules
    with ExitStack() as stack:
        stack.enter_context(_computing(first, block.replay))
        for module in rest:
            stack.enter_context(_computing(module, lambda x: x))
        try:
            got = _tensors(model(*args, **kwargs))
        except (RuntimeError, ValueError, IndexError, TypeError) as problem:
            raise LayerError(f"block {name!r} {BRANCHES} ({str(problem).splitlines()[0]})") from problem
    if len(got) != len(wanted) or not all(map(_agree, got, wanted)):
        raise LayerError(f"block {name!r} {BRANCHES}")


BRANCHES = (
    "is no chain: the model's outputs change when its first module does the work of all, so that a branch leaves it, "
    "or the model computes something between its modules; choose a block whose modules are called one after the other"
)


@contextmanager
def _computing(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the forward of a module by a function within a `with` block."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _tensors(outputs: Any) -> list[Tensor]:
    found = dict(outputs) if hasattr(outputs, "keys") else outputs
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return True  # a tie between indices may be resolved either way
    return torch.allclose(one, other, rtol=AGREEMENT, atol=AGREEMENT * float(other.abs().max()), equal_nan=True)
