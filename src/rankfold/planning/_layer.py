"""What one layer could become: each method, variant and rank with its cost and its error."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from rankfold._common import track
from rankfold.errors import LayerError, PlanError, RankfoldError
from rankfold.layers import (
    Call,
    FactorisedLayer,
    Metric,
    Rank,
    Spectrum,
    head_macs,
    layer_class,
    methods_for,
    stock_twin,
)
from rankfold.planning._amounts import Amounts
from rankfold.planning._choice import Choice
from rankfold.ranks import energy, evbmf
from rankfold.stats import LayerTime, Stats, count_bytes, count_params

LEVELS = 512
Options = dict[str, Any]
J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to find candidates for; it holds all that a worker in another process needs.

    Attributes:
        name: the layer's name, for errors and for its seed.
        layer: the stock layer.
        dense: the choice to leave it, with its cost.
        calls: the shapes it was called on, or None where nothing was measured.
        batch_size: what to divide the MACs of all calls by.
        methods: the methods to try.
        budgeted: the quantities that the budget limits; none where there is no budget.
        multiple: what ranks are rounded to.
        seed: seed of the layer's decompositions.
        weightless: whether no weight is to be read: choices then have no error.
        metric: what errors are measured in, None on the weights.
        times: how long the layer and its replacements take, where that was measured.
        head_calls: of an embedding, the calls of the head that is tied to it.
    """

    name: str
    layer: nn.Module
    dense: Choice
    calls: tuple[Call, ...] | None
    batch_size: int
    methods: tuple[str, ...] = ()
    budgeted: tuple[str, ...] = ()
    multiple: int = 1
    seed: int = 0
    weightless: bool = False
    metric: Metric | None = None
    times: LayerTime | None = None
    head_calls: tuple[Call, ...] = ()
    classes: tuple[type[FactorisedLayer], ...] = field(init=False)  # a worker may not have registered them

    def __post_init__(self) -> None:
        known = methods_for(self.layer)
        found = tuple(layer_class(self.layer, method) for method in self.methods if method in known)
        object.__setattr__(self, "classes", found)


def untouched(name: str, layer: nn.Module, stats: Stats | None, reason: str = "") -> Choice:
    """Return the choice to leave a layer dense, with all that is known of it."""
    time = stats.times.layers.get(name) if stats and stats.times else None
    macs = stats.layers[name].macs if stats else None
    known = Amounts(count_params(layer), macs, count_bytes(layer), time.dense if time else None)
    return Choice("dense", amounts=known, dense=known, error=0.0, reason=reason)


def fitting(name: str, layer: nn.Module, choice: Choice) -> tuple[nn.Module, type[FactorisedLayer]]:
    """Return the stock twin of a layer and the class that a choice makes of it.

    Raises:
        PlanError: the choice does not fit the layer.
    """
    try:
        dense = stock_twin(layer)
        cls = layer_class(dense, choice.method)
        _check_rank(choice.rank, cls.full_rank(dense, **choice.options))
    except (TypeError, RankfoldError) as error:
        raise PlanError(f"layer {name!r} ({type(layer).__name__}) and the plan: {error}") from error
    return dense, cls


def _check_rank(rank: Any, full: Any) -> None:
    ranks, limits = (value if isinstance(value, tuple) else (value,) for value in (rank, full))
    if isinstance(rank, tuple) != isinstance(full, tuple) or len(ranks) != len(limits):
        raise PlanError(f"rank {rank!r} has another form than the full rank {full!r}")
    if any(given > limit for given, limit in zip(ranks, limits, strict=True)):
        raise PlanError(f"rank {rank!r} is beyond the full rank {full!r}: choose one up to it, or leave it dense")


def layer_seed(name: str, seed: int) -> int:
    """Return the seed of one layer: independent of the other layers and of the order of work."""
    return (seed + zlib.crc32(name.encode())) % 2**31


def run(function: Callable[[J], R], jobs: Sequence[J], *, executor: Executor | None, description: str) -> list[R]:
    """Apply a function to every job, in the executor's workers if there is one; results in the jobs' order."""
    results: Iterable[R] = map(function, jobs) if executor is None else executor.map(function, jobs)
    return list(track(results, description, total=len(jobs)))


def variants_of(job: Job) -> Iterator[tuple[type[FactorisedLayer], Options]]:
    """Yield layer class and options of every method and variant to try on a layer."""
    for cls in job.classes:
        for options in cls.variants(job.layer):
            yield cls, dict(options)


def grid(job: Job) -> tuple[Choice, ...]:
    """Return dense, and every method, variant and rank of the grid that pays.

    Where no weight is to be read they come in the order of preference: dense, then the methods as they
    were given, of each the largest share kept of the full rank first, then the cheapest.
    """
    return _named(job, _preferences if job.weightless else _grid)


def energy_ladder(job: Job) -> tuple[Choice, ...]:
    """Return a choice per level of error, the same in every layer, from no error down to rank one.

    At level k each singular-value spectrum keeps at least 1 - (k / LEVELS)^2 of its energy. In another metric than
    the weights the outputs do: the choice is the cheapest whose error is at most k / LEVELS.
    """
    if job.metric is not None:
        return _named(job, _error_ladder)
    keeps = [1 - (level / LEVELS) ** 2 for level in range(LEVELS)]
    return _named(job, lambda job: _ladder(job, lambda spectrum: [energy(spectrum.values, x) for x in keeps], LEVELS))


def _error_ladder(job: Job) -> tuple[Choice, ...]:
    ordered = sorted(_grid(job), key=lambda choice: share(choice, job.budgeted))
    return tuple(next(c for c in ordered if (c.error or 0.0) <= level / LEVELS) for level in range(LEVELS + 1))


def evbmf_ladder(job: Job) -> tuple[Choice, ...]:
    """Return a choice per weakening factor w, the same in every layer; EVBMF's own ranks without a budget.

    From w = 0, the full rank, the rank falls linearly to EVBMF's at w = 1, as MUSCO weakens it:
    R = R_full - w (R_full - R_evbmf). Beyond, to w = 2, it falls linearly to one, for budgets that
    EVBMF's own ranks exceed.
    """
    steps = [2 * level / LEVELS for level in range(LEVELS + 1)] if job.budgeted else [1.0]
    return _named(job, lambda job: _ladder(job, lambda spectrum: _weakened(spectrum, steps), len(steps)))


def _weakened(spectrum: Spectrum, steps: Sequence[float]) -> list[int]:
    full, found = len(spectrum.values), max(1, evbmf(spectrum.values, spectrum.shape).rank)
    return [math.ceil(full - w * (full - found)) if w <= 1 else math.ceil(found - (w - 1) * (found - 1)) for w in steps]


def _named(job: Job, propose: Callable[[Job], tuple[Choice, ...]]) -> tuple[Choice, ...]:
    """Run a proposal; an error of ours names the layer."""
    try:
        return propose(job)
    except PlanError:
        raise
    except RankfoldError as error:
        raise LayerError(f"layer {job.name!r} ({type(job.layer).__name__}): {error}") from error


def _grid(job: Job) -> tuple[Choice, ...]:
    found = [job.dense]
    for cls, options in variants_of(job):
        ranks = _ranks(job, cls, options)
        choices = [choice for rank in ranks if pays(choice := _priced(job, cls, rank, options), job.budgeted)]
        found += _with_errors(job, cls, options, choices)
    return tuple(found)


def _preferences(job: Job) -> tuple[Choice, ...]:
    ranked = []
    for cls, options in variants_of(job):
        full = cls.full_rank(job.layer, **options)
        for rank in _ranks(job, cls, options):
            choice = _priced(job, cls, rank, options)
            if pays(choice, job.budgeted):
                ranked.append((job.methods.index(cls.method), -_kept(rank, full), choice.params or 0, choice))
    return (job.dense, *(choice for *_, choice in sorted(ranked, key=lambda entry: entry[:3])))


def _ranks(job: Job, cls: type[FactorisedLayer], options: Options) -> tuple[Rank, ...]:
    """Return the grid of ranks: for a budget on latency, where there are any, those at the end of a step of time."""
    if "latency" in job.budgeted and job.times is not None:
        multiple = math.lcm(job.multiple, job.times.grain(cls.method, options))
        if snapped := cls.rank_grid(job.layer, multiple=multiple, **options):
            return snapped
    return cls.rank_grid(job.layer, multiple=job.multiple, **options)


def _kept(rank: Rank, full: Rank) -> float:
    """Return the share that is kept of the full rank; of several ranks, their geometric mean."""
    ranks, limits = (value if isinstance(value, tuple) else (value,) for value in (rank, full))
    return math.prod(r / limit for r, limit in zip(ranks, limits, strict=True)) ** (1 / len(ranks))


def _ladder(job: Job, ranks_of: Callable[[Spectrum], list[int]], levels: int) -> tuple[Choice, ...]:
    """Return, per level, the cheapest choice that pays among those with the level's ranks, or dense."""
    columns = []
    for cls, options in variants_of(job):
        spectra = cls.spectra(job.layer, **options)
        if not spectra:
            raise PlanError(
                f"method {cls.method!r} has no singular values for the rules 'energy' and 'evbmf' to read: "
                "leave it out of methods, or use rule 'optimal' or 'uniform'"
            )
        full = cls.full_rank(job.layer, **options)
        exact = list(zip(*map(ranks_of, spectra), strict=True))
        rounded = {level: _rounded(level, full, job.multiple) for level in set(exact)}
        ranks = [rounded[level] for level in exact]
        priced = {rank: _priced(job, cls, rank, options) for rank in set(ranks)}
        paying = [choice for choice in priced.values() if pays(choice, job.budgeted)]
        final = {choice.rank: choice for choice in _with_errors(job, cls, options, paying)}
        columns.append([final.get(rank, job.dense) for rank in ranks])
    rows = zip(*columns, strict=True) if columns else [()] * levels
    return tuple(min((job.dense, *row), key=lambda choice: share(choice, job.budgeted)) for row in rows)


def _rounded(ranks: tuple[int, ...], full: Rank, multiple: int) -> Rank:
    """Round ranks up to the multiple, at most to the full rank; an int where the method's rank is one."""
    limits = (full,) if isinstance(full, int) else full
    rounded = tuple(min(limit, -(-rank // multiple) * multiple) for rank, limit in zip(ranks, limits, strict=True))
    return rounded[0] if isinstance(full, int) else rounded


def _priced(job: Job, cls: type[FactorisedLayer], rank: Rank, options: Options) -> Choice:
    amounts = amounts_of(job, cls, rank, options)
    return replace(job.dense, method=cls.method, rank=rank, options=options, amounts=amounts, error=None)


def amounts_of(job: Job, cls: type[FactorisedLayer], rank: Rank, options: Options) -> Amounts:
    """Return what a layer takes once a class has factorised it."""
    cost = cls.cost(job.layer, job.calls or (), rank=rank, **options)
    weight: Any = job.layer.weight
    dense = job.dense.dense
    return Amounts(
        params=cost.params,
        macs=None if job.calls is None else (cost.macs + _head_macs(job, rank)) // job.batch_size,
        bytes=(dense.bytes or 0) + (cost.params - (dense.params or 0)) * weight.element_size(),
        latency=None if job.times is None else job.times.seconds(cls.method, options, rank),
    )


def _head_macs(job: Job, rank: Any) -> int:
    """Return the multiply-adds of the head that is tied to an embedding; none where there is no head."""
    if not job.head_calls:
        return 0
    weight: Any = job.layer.weight
    rows, dim = weight.shape
    return head_macs(rows, dim, job.head_calls, rank=rank)


def _with_errors(job: Job, cls: type[FactorisedLayer], options: Options, choices: list[Choice]) -> list[Choice]:
    if not choices:
        return []
    ordered = sorted(choices, key=lambda choice: (choice.params or 0, choice.rank))
    ranks = [choice.rank for choice in ordered if choice.rank is not None]
    measured = {} if job.metric is None else {"metric": job.metric}
    errors = cls.errors(job.layer, ranks, seed=job.seed, **measured, **options)
    return [replace(choice, error=float(error)) for choice, error in zip(ordered, errors, strict=True)]


def pays(choice: Choice, budgeted: Sequence[str]) -> bool:
    """Tell whether a choice makes a budgeted quantity smaller, knows all of them, and makes no known one larger.

    A quantity that the dense layer has none of (the MACs of an embedding) may grow.
    """
    known = [(quantity, new, choice.dense[quantity]) for quantity, new in choice.amounts.known()]
    smaller = any(new < old for q, new, old in known if q in (budgeted or ("params",)))
    priced = all(choice.amounts[q] is not None for q in budgeted)
    return smaller and priced and all(new <= old or old == 0 for _, new, old in known)


def share(choice: Choice, quantities: Sequence[str]) -> float:
    """Return the largest share of a budgeted quantity of the dense layer that a choice keeps."""
    shares = []
    for quantity in quantities or ("params",):
        if old := choice.dense[quantity]:
            shares.append(choice.amounts[quantity] / old)
    return max(shares, default=1.0)
