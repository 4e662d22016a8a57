"""Carry out a plan: a new model with other layers in place of those that the plan names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rankfold._copies import copy_with
from rankfold._pretrained import register, remember
from rankfold.attention import joined_attention, with_named_projections
from rankfold.errors import LayerError, PlanError, RankfoldError
from rankfold.layers import (
    FactorisedLayer,
    LowRankEmbedding,
    Metric,
    TiedHead,
    is_factorised,
    layer_class,
    refusal,
    stock_twin,
    untwinned,
)
from rankfold.planning import (
    INITS,
    Choice,
    Init,
    Plan,
    block_modules,
    check_stats,
    fresh_block,
    is_block,
    layer_seed,
    near,
    planned_metric,
    run,
    stand_ins,
    structural_refusals,
    without_values,
)
from rankfold.stats import Stats, walk

DENSE_TYPE = "_dense_type"  # the entry in a factorised layer of what it replaced, where that was no stock layer


@dataclass(frozen=True, eq=False)
class _Replacement:
    """One layer to build; it holds all that a worker in another process needs."""

    name: str
    layer: nn.Module
    cls: type[FactorisedLayer]
    choice: Choice
    init: Init
    seed: int
    metric: Metric | None


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    stats: Stats | None = None,
    init: Init = "decompose",
    seed: int = 0,
    executor: Executor | None = None,
) -> nn.Module:
    """Return a new model with the plan's layers replaced; the model itself is not changed.

    The plan is checked against the whole model before anything is built. Layers that the plan leaves dense
    or doesn't name are copied. Weights that are replaced are never copied, and a module that occurs in
    several places is replaced in all of them by one. Where a layer inside an `nn.TransformerEncoderLayer`
    is replaced, the copy's fused inference path, which reads dense weights, is switched off. Where the plan names
    a projection of an `nn.MultiheadAttention` ("attention.q_proj"), that attention is separated first, as
    `separate_attention` does.

    Args:
        model: the model that the plan was made for, or one of the same shape.
        plan: what becomes of each layer.
        stats: what the plan was made from, where its metric is of anything but the weights.
        init: "decompose" the weights, or draw them at "random" to train from scratch.
        seed: seed of whatever is random in a decomposition or an initialisation; that of `plan` gives its errors.
        executor: build layers in parallel in this executor's workers; the result is the same.

    Raises:
        PlanError: the plan doesn't fit the model, or the statistics don't or lack what its metric needs.
        LayerError: a weight can't be decomposed, or the model can't be copied together with its new layers.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> small = apply(model, rankfold.Plan({"0": rankfold.Choice("svd", rank=8)}))
        >>> small[0].rank, model[0].weight.shape
        (8, torch.Size([64, 64]))
    """
    if init not in INITS:
        raise PlanError(f"init={init!r} is neither 'decompose' nor 'random'")
    model = with_named_projections(model, plan.layers)
    layers = dict(walk(model))
    check_stats(layers, stats)
    jobs = _checked(model, layers, plan, init, seed, stats)
    blocks = _blocks(model, plan, init, seed)
    _refuse_captured(model, {id(layers[job.name]) for job in jobs} | blocks.keys())
    built = run(_build, jobs, executor=executor, description="Building layers")
    for job, new in zip(jobs, built, strict=True):
        if type(layers[job.name]) is not type(job.layer):
            vars(new)[DENSE_TYPE] = type(layers[job.name])
    small = copy_with(model, blocks | {id(layers[job.name]): new for job, new in zip(jobs, built, strict=True)})
    if remember(small):
        with suppress(RankfoldError):  # an old version of transformers, which `rankfold.hub` would speak of
            register(partial(apply, init="random"))
    return small


def replace_block(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return a new model in which one layer stands for the block "first:last"; the model itself is not changed.

    The layer takes the place of the first module, and identities that of the others.

    Raises:
        PlanError: the model has no such block.
        LayerError: the model can't be copied together with its new layer.
    """
    new = stand_ins(model, name, layer)
    _refuse_captured(model, set(new))
    return copy_with(model, new)


def densify(model: nn.Module, *, methods: str | Collection[str] = ()) -> nn.Module:
    """Return a new model in which every factorised layer is the stock layer that computes the same function.

    The head of a low-rank embedding (`LowRankEmbedding.tied_head`) becomes an `nn.Linear` tied to the embedding's
    weight, a separated attention an `nn.MultiheadAttention`, and what was a Conv1D of Hugging Face is one again. The
    model itself is not changed.

    Args:
        model: any module.
        methods: the methods whose layers become dense again, such as "svd_form"; all of them if empty.

    Raises:
        LayerError: the model can't be copied together with its new layers.

    Example:
        >>> import torch, rankfold
        >>> small = torch.nn.Sequential(rankfold.layers.LowRankLinear(64, 64, rank=8))
        >>> type(densify(small)[0]).__name__
        'Linear'
    """
    wanted = (methods,) if isinstance(methods, str) else methods
    found = [layer for _, layer in walk(model) if is_factorised(layer)]
    dense = {id(layer): _dense(layer) for layer in found if not wanted or layer.method in wanted}
    tables = {id(m.down): dense[id(m)] for m in model.modules() if isinstance(m, LowRankEmbedding) and id(m) in dense}
    for head in model.modules():
        if isinstance(head, TiedHead):
            dense[id(head)] = _dense(head)
            if id(head.down) in tables:
                dense[id(head)].weight = tables[id(head.down)].weight
    copied = copy_with(model, dense)
    return copied if wanted else joined_attention(copied)


def _dense(layer: nn.Module) -> nn.Module:
    twin: nn.Module = layer.to_dense()  # type: ignore[operator]
    return untwinned(twin.train(layer.training), vars(layer).get(DENSE_TYPE, type(twin)))


def _checked(  # noqa: PLR0913
    model: nn.Module, layers: Mapping[str, nn.Module], plan: Plan, init: Init, seed: int, stats: Stats | None
) -> list[_Replacement]:
    """Return what there is to build, once the whole plan is known to fit the model."""
    refused = structural_refusals(model)
    jobs = []
    for name, choice in plan.layers.items():
        if is_block(choice):
            continue
        if name not in layers:
            raise PlanError(f"the plan names a layer {name!r} that the model doesn't have{near(name, layers)}")
        if choice.method == "dense":
            continue
        layer = layers[name]
        reason = refused.get(name) or _unfit(layer, init)
        if reason:
            raise PlanError(f"layer {name!r} ({type(layer).__name__}) can't be replaced: {reason}")
        metric = planned_metric(plan, name, stats) if init == "decompose" else None
        jobs.append(_checked_job(name, layer, choice, init, seed, metric))
    return jobs


def _blocks(model: nn.Module, plan: Plan, init: Init, seed: int) -> dict[int, nn.Module]:
    """Return what takes the place of each module of the plan's blocks, by id."""
    replaced: dict[int, nn.Module] = {}
    for name, choice in plan.layers.items():
        if not is_block(choice):
            continue
        if init != "random":
            raise PlanError(
                f"block {name!r}: a {choice.method} layer is found from data, which a plan does not hold: call "
                "rankfold.train.decouple, or use init='random'"
            )
        block = block_modules(model, name)
        planned = [key for key in block if key in plan.layers and plan.layers[key].method != "dense"]
        if planned or replaced.keys() & {id(module) for module in block.values()}:
            raise PlanError(f"block {name!r}: the plan replaces one of its modules twice: leave it out once")
        layer: Any = fresh_block(model, name, choice)
        layer.reset_parameters(torch.Generator().manual_seed(layer_seed(name, seed)))
        replaced |= stand_ins(model, name, layer)
    return replaced


def _unfit(layer: nn.Module, init: Init) -> str | None:
    """Return why a layer on its own can't be replaced; a random initialisation doesn't look at its values."""
    if init == "random":
        return refusal(without_values(layer))
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return "its weight is on the meta device and has no values: use init='random'"
    return refusal(layer)


def _checked_job(
    name: str, layer: nn.Module, choice: Choice, init: Init, seed: int, metric: Metric | None
) -> _Replacement:
    try:
        dense = stock_twin(layer)
        cls = layer_class(dense, choice.method)
        full = cls.full_rank(dense, **choice.options)
        _check_rank(choice.rank, full)
    except (TypeError, RankfoldError) as error:
        raise PlanError(f"layer {name!r} ({type(layer).__name__}) and the plan: {error}") from error
    return _Replacement(name, dense, cls, choice, init, layer_seed(name, seed), metric)


def _check_rank(rank: Any, full: Any) -> None:
    ranks, limits = (value if isinstance(value, tuple) else (value,) for value in (rank, full))
    if isinstance(rank, tuple) != isinstance(full, tuple) or len(ranks) != len(limits):
        raise PlanError(f"rank {rank!r} has another form than the full rank {full!r}")
    if any(given > limit for given, limit in zip(ranks, limits, strict=True)):
        raise PlanError(f"rank {rank!r} is beyond the full rank {full!r}: choose one up to it, or leave it dense")


def _build(job: _Replacement) -> nn.Module:
    make: Any = job.cls.from_dense if job.init == "decompose" else job.cls.like
    measured = {} if job.metric is None else {"metric": job.metric}
    try:
        new: nn.Module = make(job.layer, rank=job.choice.rank, seed=job.seed, **measured, **job.choice.options)
    except RankfoldError as error:
        raise LayerError(f"layer {job.name!r} ({type(job.layer).__name__}): {error}") from error
    return new.train(job.layer.training)


def _refuse_captured(model: nn.Module, replaced: set[int]) -> None:
    """Raise where a function kept on a module holds layers to be replaced: no copy of the model changes those."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if any(id(m) in replaced for captured in _captured(value) for m in captured.modules()):
                raise LayerError(
                    f"{f'{name}.{key}' if name else key} is a function that holds layers of this model, and a copy's "
                    "would still call these: make it a method, or exclude the layers that it calls"
                )


def _captured(value: Any) -> Iterator[nn.Module]:
    """Yield the modules in the closure of a function; nothing for any other value."""
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # a cell that was not filled yet
            if isinstance(cell.cell_contents, nn.Module):
                yield cell.cell_contents
