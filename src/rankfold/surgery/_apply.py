"""Apply a plan: make a new model in which the layers that the plan names are replaced."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import one_of
from rankfold.errors import LayerError, PlanError, RankfoldError
from rankfold.layers import (
    FactorisedLayer,
    Metric,
    TiedHead,
    is_factorised,
    tied_methods,
    untwinned,
)
from rankfold.planning import (
    INITS,
    Blocks,
    Choice,
    Init,
    Plan,
    Planning,
    block_modules,
    check_stats,
    fits,
    fresh_block,
    is_block,
    layer_seed,
    planned_metric,
    run,
    solved_block,
    stand_ins,
    tied_heads,
)
from rankfold.stats import Stats, walk
from rankfold.surgery._attention import joined_attention, with_named_projections
from rankfold.surgery._copies import copy_with
from rankfold.surgery._huggingface import remember

DENSE_TYPE = "_dense_type"  # attribute of a factorised layer: the type that it replaced, if that was no stock layer


@dataclass(frozen=True, eq=False)
class _Replacement:
    """One layer to build, with everything that a worker in another process needs."""

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
    init: Init | None = None,
    seed: int | None = None,
    executor: Executor | None = None,
    blocks: Blocks | None = None,
) -> nn.Module:
    """Return a new model with the plan's layers replaced; the model itself is not changed.

    The plan is checked against the whole model before anything is built. Layers that the plan leaves dense or doesn't
    name are copied; weights that are replaced are never copied. A module that occurs in several places is replaced by
    the same new layer in all of them. When an embedding is replaced, the linear layer that shares its weight becomes
    its `tied_head`. When a layer inside an `nn.TransformerEncoderLayer` is replaced, the copy's fused inference path,
    which reads dense weights, is switched off. When the plan names a projection of an `nn.MultiheadAttention`
    ("attention.q_proj"), that attention is first separated as by `separate_attention`. A Hugging Face model keeps the
    plan in its configuration, which `save_pretrained` writes; `rankfold.hub` loads it again.

    Args:
        model: the model that the plan was made for, or one with the same layers.
        plan: what becomes of each layer.
        stats: the statistics that the plan was made from; needed unless its metric is that of the weights.
        init: "decompose" the weights, or draw new ones at "random" to train from scratch; by default what was planned.
        seed: seed for random steps in decompositions and initialisations; by default that of the plan, with which the
            errors are those that it predicts.
        executor: an executor whose workers build layers in parallel; the result is the same.
        blocks: the candidates that the plan was made with, if it chose a layer for a block; by default those that the
            plan still has in memory, since its JSON holds no values.

    Raises:
        PlanError: the plan or the statistics don't fit the model, or the statistics lack what the metric needs.
        LayerError: a weight can't be decomposed, or the model can't be copied together with its new layers.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> small = apply(model, rankfold.Plan({"0": rankfold.Choice("svd", rank=8)}))
        >>> small[0].rank, model[0].weight.shape
        (8, torch.Size([64, 64]))
    """
    how = plan.planning or Planning()
    init, seed = how.init if init is None else init, how.seed if seed is None else seed
    one_of("init", init, INITS, error=PlanError)
    if blocks and init == "random":
        raise PlanError("blocks= hold values that were found, and init='random' draws others: leave one of them out")
    if blocks is None and init != "random" and isinstance(how.blocks, Mapping):
        blocks = how.blocks
    model = with_named_projections(model, plan.layers)
    layers, heads = dict(walk(model)), tied_heads(model)
    check_stats(layers, stats)
    jobs = _jobs(model, plan, heads, init, seed, stats)
    standing = _blocks(model, plan, blocks or {}, init, seed)
    followers = {job.name: layers[heads[job.name]] for job in jobs if job.name in heads}
    changed = {id(layers[job.name]) for job in jobs} | set(map(id, followers.values()))
    _refuse_captured(model, changed | standing.keys())
    built = run(_build, jobs, executor=executor, description="Building layers")
    replaced: dict[int, Any] = dict(standing)
    for job, new in zip(jobs, built, strict=True):
        replaced[id(layers[job.name])] = new
        if type(layers[job.name]) is not type(job.layer):
            vars(new)[DENSE_TYPE] = type(layers[job.name])
        if job.name in followers:
            replaced |= _following(new, followers[job.name], job)
    small = copy_with(model, replaced)
    remember(small)
    return small


def replace_block(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return a new model in which one layer replaces the block "first:last"; the model itself is not changed.

    The layer replaces the first module of the block, and identities replace the others.

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
    weight, a separated attention becomes an `nn.MultiheadAttention`, and a layer that was a Conv1D of Hugging Face
    becomes one again. The model itself is not changed.

    Args:
        model: any module.
        methods: methods whose layers become dense again, such as "svd_form"; all methods if empty.

    Raises:
        LayerError: the model can't be copied together with its new layers.

    Example:
        >>> import torch, rankfold
        >>> small = torch.nn.Sequential(rankfold.layers.LowRankLinear(64, 64, rank=8))
        >>> type(densify(small)[0]).__name__
        'Linear'
    """
    wanted = (methods,) if isinstance(methods, str) else methods
    found: list[Any] = [layer for _, layer in walk(model) if is_factorised(layer)]
    dense: dict[int, Any] = {id(layer): _dense(layer) for layer in found if not wanted or layer.method in wanted}
    tables = {id(layer.down): dense[id(layer)] for layer in found if id(layer) in dense and _may_be_tied(layer)}
    for head in [module for module in model.modules() if isinstance(module, TiedHead)]:
        if id(head.down) in tables or not wanted:
            new: Any = _dense(head)
            if id(head.down) in tables:
                new.weight = tables[id(head.down)].weight
            dense |= {id(head): new} | _bias_of(head, new)
    copied = copy_with(model, dense)
    return copied if wanted else joined_attention(copied)


def _may_be_tied(layer: Any) -> bool:
    return layer.dense_type is nn.Embedding and layer.method in tied_methods()


def _following(embedding: Any, head: Any, job: _Replacement) -> dict[int, Any]:
    """Return what replaces the head of an embedding, and its bias wherever else that is used."""
    bias: Any = False
    if head.bias is not None:
        bias = True if job.init == "random" else _corrected(head, embedding, job.metric)
    new: Any = TiedHead(embedding, bias).train(head.training)
    if head.bias is not None:
        new.bias.requires_grad_(head.bias.requires_grad)
    return {id(head): new} | _bias_of(head, new)


def _corrected(head: Any, embedding: Any, metric: Metric | None) -> Tensor:
    """Return the bias `b + (W - W') E[x]` of a head for the table W' of an embedding; b if E[x] is not known."""
    bias: Tensor = head.bias.detach()
    if metric is None:
        return bias
    wide = torch.promote_types(bias.dtype, torch.float32)
    mean = metric.mean[0].to(bias.device, wide)
    down, up = (stage.weight.detach().to(wide) for stage in (embedding.down, embedding.up))
    change: Tensor = head.weight.detach().to(wide) @ mean - down @ (up.T @ mean)
    return (bias.to(wide) + change).to(bias.dtype)


def _bias_of(head: Any, new: Any) -> dict[int, Any]:
    """Return the new bias for the old one, which other modules may have too, as in the heads of BERT."""
    return {} if head.bias is None else {id(head.bias): new.bias}


def _dense(layer: nn.Module) -> nn.Module:
    twin: nn.Module = layer.to_dense()  # type: ignore[operator]
    return untwinned(twin.train(layer.training), vars(layer).get(DENSE_TYPE, type(twin)))


def _jobs(
    model: nn.Module, plan: Plan, heads: Mapping[str, str], init: Init, seed: int, stats: Stats | None
) -> list[_Replacement]:
    """Return the layers to build, after checking that the whole plan fits the model."""
    layers = dict(walk(model))
    jobs = []
    for name, (dense, cls) in fits(model, plan.layers, init).items():
        metric = planned_metric(plan, name, stats, layers, heads.get(name)) if init == "decompose" else None
        jobs.append(_Replacement(name, dense, cls, plan.layers[name], init, layer_seed(name, seed), metric))
    return jobs


def _blocks(model: nn.Module, plan: Plan, blocks: Blocks, init: Init, seed: int) -> dict[int, nn.Module]:
    """Return what replaces each module of the plan's blocks, by id."""
    replaced: dict[int, nn.Module] = {}
    for name, choice in plan.layers.items():
        if not is_block(choice):
            continue
        block = block_modules(model, name)
        planned = [key for key in block if key in plan.layers and plan.layers[key].method != "dense"]
        if planned or replaced.keys() & {id(module) for module in block.values()}:
            raise PlanError(f"block {name!r}: the plan replaces one of its modules twice: leave it out once")
        layer: Any = fresh_block(model, name, choice) if init == "random" else solved_block(model, name, choice, blocks)
        if init == "random":
            layer.reset_parameters(torch.Generator().manual_seed(layer_seed(name, seed)))
        replaced |= stand_ins(model, name, layer)
    return replaced


def _build(job: _Replacement) -> nn.Module:
    make: Any = job.cls.from_dense if job.init == "decompose" else job.cls.like
    measured = {} if job.metric is None else {"metric": job.metric}
    try:
        new: nn.Module = make(job.layer, rank=job.choice.rank, seed=job.seed, **measured, **job.choice.options)
    except RankfoldError as error:
        raise LayerError(f"layer {job.name!r} ({type(job.layer).__name__}): {error}") from error
    return new.train(job.layer.training)


def _refuse_captured(model: nn.Module, replaced: set[int]) -> None:
    """Raise if a function stored on a module holds layers to be replaced: a copy of the model would still use them."""
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
        with suppress(ValueError):  # an empty cell
            if isinstance(cell.cell_contents, nn.Module):
                yield cell.cell_contents
