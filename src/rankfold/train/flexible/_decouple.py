"""Replace a block of a network by one flexible layer, fitted to what the block computes on data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import track, whole
from rankfold.decompose import Basis, svd
from rankfold.errors import BudgetError, DataError, RankfoldError
from rankfold.layers import FlexibleLayer, FlexibleLinear
from rankfold.planning import Amounts, Budget, Choice, Plan, SolvedBlock, block_choice, block_modules, check_apart
from rankfold.stats import count_params, walk
from rankfold.surgery import replace_block
from rankfold.train.flexible._block_data import Block, read_block, sample_inputs
from rankfold.train.flexible._block_fit import fitted_to_values, value_error
from rankfold.train.flexible._block_tensors import activation_of, affine_error, affordable, frame_of, solve_block

HELD_OUT = 5  # one sample in 5 is held out to measure the error
MEMORY = 1e9
RANK_DIVISORS = (4, 8, 16, 32, 64)  # ranks tried by default: the one that saves nothing, divided by these
MOST_RANK = 256  # the largest of them: the time to solve grows faster than the square of the rank


@dataclass(frozen=True)
class BlockError:
    """How well a flexible layer of one rank replaces a block.

    Attributes:
        rank: number of neurons.
        params: number of parameters of the layer.
        error: relative Frobenius error of its values on held-out samples.
        low_rank_error: the same error for the block with its weights truncated by SVD to as many parameters.
        affine_error: the same error for the best affine map of the block's inputs, of any size; if the flexible layer
            is no better than that, the block is nearly linear on the data.
    """

    rank: int
    params: int
    error: float
    low_rank_error: float
    affine_error: float


def decouple(  # noqa: PLR0913 (one keyword per choice)
    model: nn.Module,
    block: str,
    data: Iterable[Any],
    *,
    rank: int | None = None,
    budget: Budget | None = None,
    basis: str = "piecewise",
    size: int = 8,
    element: str | None = None,
    samples: int = 1280,
    rows: int = 0,
    memory: float = MEMORY,
    seed: int = 0,
) -> tuple[nn.Module, Plan]:
    """Return a new model in which one flexible layer replaces a block, and its plan; the model is not changed.

    The block is a chain of linear layers, or of convolutions of kernel 1, with pointwise functions between them. There
    may be a BatchNorm after each layer but the last, which is taken as in eval mode. The inputs of the block are
    sampled from the data (for a convolution, at random positions of the images). The block's values and Jacobians at
    these samples are factorised by `rankfold.decompose.coupled`, in coordinates in which the inputs have unit variance
    and of which the leading `2 rank + 16` are kept. The predicted error in the plan is that of the values on one fifth
    of the samples, which the solver does not see.

    Args:
        model: any module.
        block: names of the first and the last module of the block, such as "classifier.0:classifier.2".
        data: batches: tensors, tuples (inputs first) or dicts (keyword arguments); only as many are read as needed.
        rank: number of neurons.
        budget: instead of the rank, `Budget(params=…)`: the highest rank that keeps the whole model within it.
        basis: family of the activation functions: "piecewise", "legendre", … (`rankfold.layers.FlexibleActivation`).
        size: number of basis functions per activation.
        element: "relu", "tanh", "gelu" or "" for none; by default the block's own activation if it is curved.
        samples: number of rows of the block's input (for images, of positions) at which to factorise.
        rows: number of rows at which the values are fitted afterwards, which takes 8 * rows * in_features bytes. This
            helps a lot if the block has many inputs and the rank is well below its width. 0 skips it.
        memory: bytes for the Jacobians and the solver's copies of them; if they do not fit, fewer samples are used.
        seed: seed for the choice of samples and for random starts.

    Raises:
        PlanError: the model has no such block.
        LayerError: the block branches, or has a layer that is neither pointwise nor linear (such as a convolution with
            a larger kernel, a stride, padding or groups).
        DataError: there is no data, it contains NaN or Inf, or there are fewer samples than the rank.
        BudgetError: no rank meets the budget, or the budget is not on parameters.
        DecompositionError: the basis is unknown.
        RankfoldError: the rank is below 1, or neither or both of rank and budget are given.

    References:
        Zniyed, Usevich, Miron and Brie 2021.

    Example:
        >>> import torch, rankfold as rf
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small, plan = decouple(model, "0:2", [torch.randn(400, 8)] * 8, rank=6, samples=300)
        >>> small[0].rank, small(torch.ones(1, 8)).shape, plan.layers["0:2"].method
        (6, torch.Size([1, 4]), 'flexible')
    """
    chain = read_block(model, block)
    options = _options(chain, basis, size, element)
    rank = _rank(model, block, chain, rank, budget, options)
    parts = _samples(model, block, data, chain, rank, (samples, rows), seed)
    found = _solve(chain, parts, rank, _basis(options), memory, seed)
    layer = chain.kind.from_linear(found)
    plan = _plan(model, block, layer, value_error(found, chain, parts.held), budget)
    return replace_block(model, block, layer), plan


def decouple_errors(  # noqa: PLR0913 (one keyword per choice)
    model: nn.Module,
    block: str,
    data: Iterable[Any],
    ranks: Sequence[int],
    *,
    basis: str = "piecewise",
    size: int = 8,
    element: str | None = None,
    samples: int = 1280,
    rows: int = 0,
    memory: float = MEMORY,
    seed: int = 0,
) -> tuple[BlockError, ...]:
    """Return the error of the values on held-out samples at each rank, next to those of SVD and of an affine map.

    Use it to choose a rank: take the lowest with a small enough error, and none if the low-rank error with as many
    parameters is smaller, or if an affine map does as well. The other arguments are those of `decouple`; the model is
    not changed.

    Raises:
        RankfoldError: the block, the data or an option is one that `decouple` refuses.

    Example:
        >>> import torch, rankfold as rf
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        >>> curve = decouple_errors(model, "0:2", [torch.randn(400, 8)] * 8, (1, 8), samples=300)
        >>> [point.rank for point in curve], curve[1].error < curve[0].error
        ([1, 8], True)
    """
    chain = read_block(model, block)
    options = _options(chain, basis, size, element)
    _check_ranks(ranks)
    parts = _samples(model, block, data, chain, max(ranks), (samples, rows), seed)
    points = []
    affine = affine_error(chain, parts.fitted, parts.held)
    for rank in ranks:
        layer = _solve(chain, parts, rank, _basis(options), memory, seed)
        params = _params(chain, rank, options)
        truncated = _low_rank_error(chain, params, parts.held)
        points.append(BlockError(rank, params, value_error(layer, chain, parts.held), truncated, affine))
    return tuple(points)


def flexible_candidates(  # noqa: PLR0913 (one keyword per choice)
    model: nn.Module,
    blocks: str | Sequence[str],
    data: Iterable[Any],
    *,
    ranks: Sequence[int] | None = None,
    basis: str = "piecewise",
    size: int = 8,
    element: str | None = None,
    samples: int = 1280,
    rows: int = 0,
    memory: float = MEMORY,
    seed: int = 0,
) -> dict[str, tuple[SolvedBlock, ...]]:
    """Return flexible layers of several ranks that could replace each block, for plans with `Planning(blocks=…)`.

    In the plan they compete with everything that the layers of the block could become one by one; `apply` with the same
    `blocks` inserts the one that was chosen. The error of each is that of the block's values on held-out samples,
    relative to their deviation from the mean if the block's last layer has a bias, and to the values otherwise, like
    the errors of that layer in the metric "outputs".

    Args:
        model: any module; it is not changed.
        blocks: one or several names "first:last" of blocks that have no module in common.
        data: batches: tensors, tuples or dicts; with several blocks not an iterator, which can be read only once.
        ranks: ranks of the layers, the same for all blocks; by default 1/4, 1/8, … 1/64 of the rank at which a layer
            has as many parameters as the block, at most 256.
        basis: family of the activation functions: "piecewise", "legendre", … (`rankfold.layers.FlexibleActivation`).
        size: number of basis functions per activation.
        element: "relu", "tanh", "gelu" or "" for none; by default the block's own activation if it is curved.
        samples: number of rows of the block's input at which to factorise its values and Jacobians.
        rows: number of rows at which the values are fitted afterwards; 0 skips it.
        memory: bytes for the Jacobians and the solver's copies of them.
        seed: seed for the choice of samples and for random starts.

    Raises:
        RankfoldError: a block, the data or an option is one that `decouple` refuses.
        PlanError: two blocks have a module in common.

    Example:
        >>> import torch, rankfold as rf
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        >>> data = [torch.randn(400, 8)] * 8
        >>> blocks = flexible_candidates(model, "0:2", data, ranks=(2, 6), samples=300)
        >>> stats = rf.measure(model, data, moments=True)
        >>> plan = rf.plan(model, budget=rf.Budget(params=0.5), stats=stats, planning=rf.Planning(blocks=blocks))
        >>> plan.layers["0:2"].rank, rf.apply(model, plan, stats=stats, blocks=blocks)[0].rank
        (6, 6)
    """
    names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    if ranks is not None:
        _check_ranks(ranks)
    if len(names) > 1 and isinstance(data, Iterator):
        raise DataError(
            "an iterator yields its batches only once, and there are several blocks: pass a list or a loader"
        )
    check_apart(model, names)
    chains = {name: read_block(model, name) for name in names}
    found: dict[str, tuple[SolvedBlock, ...]] = {}
    for name, chain in chains.items():
        options = _options(chain, basis, size, element)
        wanted = _usual_ranks(model, name, chain, options) if ranks is None else ranks
        parts = _samples(model, name, data, chain, max(wanted), (samples, rows), seed)
        biased = chain.linears[-1].bias is not None
        solved = []
        for rank in track(wanted, f"Solving {name}", total=len(wanted)):
            layer = _solve(chain, parts, rank, _basis(options), memory, seed)
            error = value_error(layer, chain, parts.held, centred=biased)
            solved.append(SolvedBlock(chain.kind.from_linear(layer), error))
        found[name] = tuple(solved)
    return found


def _usual_ranks(model: nn.Module, name: str, block: Block, options: dict[str, Any]) -> list[int]:
    """Return the ranks at which a block is tried by default, highest first."""
    dense = sum(map(count_params, block_modules(model, name).values()))
    fixed, unit = _size(block, options)
    even = max(1, (dense - fixed) // unit)
    largest = min(even // RANK_DIVISORS[0], MOST_RANK)
    return sorted({max(1, largest * RANK_DIVISORS[0] // share) for share in RANK_DIVISORS}, reverse=True)


def _options(block: Block, basis: str, size: int, element: str | None) -> dict[str, Any]:
    """Return the options of the layer; the activation of the block becomes an element if it is curved."""
    if element is None:
        own = activation_of(block)
        element = own if own != "relu" else ""
    return {"basis": basis, "size": size, **({"element": element} if element else {})}


def _basis(options: dict[str, Any]) -> Basis:
    return Basis(options["basis"], options["size"], options.get("element", ""))


def _check_ranks(ranks: Sequence[int]) -> None:
    if not ranks:
        raise RankfoldError("ranks= is empty: give at least one")
    for rank in ranks:
        whole("rank of a flexible layer", rank)


def _size(block: Block, options: dict[str, Any]) -> tuple[int, int]:
    """Return the number of parameters that do not depend on the rank, and the number per neuron."""
    one, two = (_params(block, rank, options) for rank in (1, 2))
    return 2 * one - two, two - one


def _params(block: Block, rank: int, options: dict[str, Any]) -> int:
    ends = block.linears[0].in_features, block.linears[-1].out_features
    return FlexibleLinear.cost(*ends, 0, rank=rank, **options).params


def _rank(  # noqa: PLR0913 (private; one caller)
    model: nn.Module, name: str, block: Block, rank: int | None, budget: Budget | None, options: dict[str, Any]
) -> int:
    """Return the given rank, or the highest that a budget on parameters allows."""
    if (rank is None) == (budget is None):
        raise RankfoldError("give either rank= or budget=Budget(params=…), and not both")
    if budget is None:
        return whole("rank of a flexible layer", rank)
    if budget.params is None or len(budget.limits) > 1:
        raise BudgetError("the rank of a block follows from a budget on params alone: Budget(params=…)")
    total = count_params(model)
    rest = total - sum(map(count_params, block_modules(model, name).values()))
    fixed, unit = _size(block, options)
    found = int((budget.params * total - rest - fixed) // unit)
    if found < 1:
        reachable = (rest + fixed + unit) / total
        raise BudgetError(
            f"block {name!r} at rank 1 leaves {reachable:.4f} of the model's parameters, more than {budget.params}: "
            f"the rest of the model has {rest} of {total}"
        )
    return found


@dataclass(frozen=True, eq=False)
class _Parts:
    """Inputs of a block: to solve on, to fit the values at (including the former), and to measure the error on."""

    solved: Tensor
    fitted: Tensor
    held: Tensor
    rows: int


def _samples(  # noqa: PLR0913 (private; two callers)
    model: nn.Module,
    name: str,
    data: Iterable[Any],
    block: Block,
    rank: int,
    counts: tuple[int, int],
    seed: int,
) -> _Parts:
    """Return the inputs of the block on the data, for the given numbers of samples and rows."""
    samples = whole("samples", counts[0], 2)
    rows = whole("rows", counts[1], 0, why="; 0 leaves the values unfitted")
    found = sample_inputs(model, name, data, block, max(samples, rows), seed)
    both = found[:samples]
    solved, held = both[: len(both) - len(both) // HELD_OUT], both[len(both) - len(both) // HELD_OUT :]
    if len(solved) < rank or not len(held):
        raise DataError(
            f"block {name!r}: {len(both)} samples, of which {len(held)} are held out, are too few for rank {rank}: "
            "give more data, or a lower rank"
        )
    return _Parts(solved, torch.cat([solved, found[samples:]]), held, rows)


def _solve(  # noqa: PLR0913 (private; two callers)
    block: Block, parts: _Parts, rank: int, basis: Basis, memory: float, seed: int
) -> FlexibleLinear:
    frame = frame_of(block, parts.solved, rank, seed)
    fit = affordable(frame, len(parts.solved), rank, memory)
    found = solve_block(block, parts.solved[:fit], frame, rank, basis, seed)
    layer = FlexibleLinear.from_factors(found, device=parts.solved.device, dtype=block.source.weight.dtype)
    return fitted_to_values(layer, block, parts.fitted, parts.held, seed) if parts.rows else layer


def _plan(model: nn.Module, name: str, layer: FlexibleLayer, error: float, budget: Budget | None) -> Plan:
    """Return a plan with the layer for the block, and every layer outside the block dense."""
    members = block_modules(model, name)
    choices: dict[str, Choice] = {}
    for key, outside in walk(model):
        if key not in members:
            amounts = Amounts(count_params(outside))
            choices[key] = Choice("dense", amounts=amounts, dense=amounts, error=0.0)
        elif key == next(iter(members)):
            choices[name] = block_choice(model, name, SolvedBlock(layer, error))
    return Plan(choices, budget=budget, dense=Amounts(count_params(model)))


def _low_rank_error(block: Block, params: int, inputs: Tensor) -> float:
    """Return the error of the values with every weight truncated by SVD to that many parameters in total."""
    layers = block.linears
    biases = sum(0 if layer.bias is None else layer.bias.numel() for layer in layers)
    weights = [layer.weight.numel() for layer in layers]
    values = block(inputs)
    scale = torch.linalg.vector_norm(values - values.mean(0)).clamp_min(1e-300)
    truncated = {}
    for layer, entries in zip(layers, weights, strict=True):
        share = (params - biases) * entries / sum(weights)
        rank = int(share // (layer.in_features + layer.out_features))
        full = min(layer.weight.shape)
        if share < entries:
            truncated[id(layer)] = svd(layer.weight, rank).to_dense() if 0 < rank < full else 0 * layer.weight
    stages = []
    for stage in block.stages:
        if id(stage) in truncated:
            twin = nn.Linear(1, 1, device="meta")
            twin.weight, twin.bias = nn.Parameter(truncated[id(stage)]), stage.bias  # type: ignore[assignment]
            stage = twin
        stages.append(stage)
    low = replace(block, stages=tuple(stages))
    return float(torch.linalg.vector_norm(low(inputs) - values) / scale)
