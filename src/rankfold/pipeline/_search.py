"""The smallest model that keeps a promise: a search over budgets that evaluates a dozen models at most."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import atomic_path, evaluating, one_of, real, track, whole
from rankfold.errors import BudgetError, PlanError, StoreError
from rankfold.pipeline._build import build
from rankfold.pipeline._plan import planner
from rankfold.pipeline._scores import Score, monotone, standard_error
from rankfold.pipeline._work import Data, Work, check_kinds, work_for_planning
from rankfold.planning import QUANTITIES, Budget, Plan, Planning, Quantity
from rankfold.stats import Stats

EVALUATIONS = 12
RESOLUTION = 0.005  # of the dense model: budgets nearer to each other are not told apart
NEIGHBOUR = 0.03  # so far above the smallest model that keeps the promise, another one is looked at
VERSION = 1

Evaluate = Callable[[nn.Module], "float | tuple[float, int] | Tensor"]


@dataclass(frozen=True)
class Step:
    """One model that was evaluated.

    Attributes:
        plan: what it was made by.
        share: what it keeps of the quantity.
        value: what `evaluate` returned, or the mean of it.
        drop: how far that is below the dense model's.
        error: standard error of the drop; 0 where `evaluate` returns a number alone.
        kept: whether it keeps the promise, by its own drop and by the drops of all models together.
    """

    plan: Plan = field(repr=False)
    share: float
    value: float
    drop: float
    error: float
    kept: bool = False


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The smallest model that keeps the promise, and how it was found.

    Attributes:
        model: the model.
        plan: what it was made by.
        steps: every model that was evaluated, in that order.
        dense: the value of the dense model.
        quantity: what was made small.
        max_drop: the promise.
        margin: standard errors that it was to be kept by.
    """

    model: nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    steps: tuple[Step, ...]
    dense: float
    quantity: str
    max_drop: float
    margin: float

    def __str__(self) -> str:
        """Return a line per model, the largest first."""
        lines = [f"{self.quantity:>8}  {'value':>8}  {'drop':>8}  {'+-':>8}", f"{1:8.1%}  {self.dense:8.4f}  dense"]
        for step in sorted(self.steps, key=lambda step: -step.share):
            verdict = "chosen" if step.plan is self.plan else "kept" if step.kept else ""
            row = f"{step.share:8.1%}  {step.value:8.4f}  {step.drop:8.4f}  {step.error:8.4f}  {verdict}"
            lines.append(row.rstrip())
        return "\n".join(lines)


def search(  # noqa: PLR0913 (twelve at most)
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    evaluate: Evaluate,
    max_drop: float,
    quantity: Quantity = "macs",
    evaluations: int = EVALUATIONS,
    margin: float = 1.0,
    resume: str | os.PathLike[str] | None = None,
    example: Any = None,
    stats: Stats | None = None,
    planning: Planning | None = None,
    executor: Executor | None = None,
) -> SearchResult:
    """Find the smallest model whose score is at most `max_drop` below the dense model's.

    Layers are measured and decomposed once. Then budgets on one quantity are halved in between the smallest that kept
    the promise and the largest below it that didn't; each is planned, built as `compress` does, and evaluated. A model
    of drop d with standard error s keeps the promise where `d' + margin * s <= max_drop` and `d <= max_drop`, d' being
    the drops made monotone in the budget, so that one lucky model between worse ones is not taken. The search ends
    when budgets are half a hundredth of the dense model apart and a model little larger than the smallest has been
    seen too, or when evaluations are used up.

    The promise is meant for data that the search does not see, and the search chooses: evaluate on data that is not in
    the loader, and return scores per sample, so that the margin is known. With a few hundred samples the standard
    error is larger than a drop of one hundredth, and the search says so instead of finding a model by luck.

    Args:
        model: any module; it is not changed.
        loader: an iterable of batches, a few hundred typical inputs, to plan and build with, as `compress` does.
        evaluate: a function of a model to its score, higher being better: a number; a pair of the mean and the count
            of rights and wrongs; or, best, a vector with the score of every sample, in the same order each time. The
            model is in eval mode, without gradients. The dense model is evaluated first.
        max_drop: how far the score may fall, in its own unit: 0.01 is one point of an accuracy.
        quantity: what to make small: "macs", "params", "bytes" or "latency".
        evaluations: how many models to evaluate at most, the dense one included.
        margin: standard errors to keep the promise by: at 1, five in six searches that end at the very edge of the
            promise keep it on other data; at 0 the score is taken at its word.
        resume: a file that all scores are written to; those of the same model and the same plans that it has already
            are not evaluated again. The loader must yield the same data for the plans to be the same.
        example: instead of a loader, the arguments of one call, from which only shapes are taken. Besides a loader it
            is what latency is measured on, instead of the loader's first batch.
        stats: what `measure` found before; it is then not measured again. For quantity "latency" with times from
            `rankfold.latency.time_layers`, the runtime and the threads of those are taken.
        planning: methods, rule, metric, objective and the other options; by default `Planning()`.
        executor: decompose layers in parallel in this executor's workers; the result is the same.

    Raises:
        BudgetError: no model that was tried keeps the promise; says which came closest. Or there are too few samples
            to show that one does.
        DataError: `evaluate` returned NaN, or no score.
        StoreError: `resume` is another file, or of another model.

    Example:
        >>> import torch, rankfold as rf
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        >>> y = net(x).detach()
        >>> def score(model):
        ...     return -float((model(x).detach() - y).norm() / y.norm())
        >>> found = rf.search(net, example=x, evaluate=score, max_drop=0.6)
        >>> len(found.steps) < 12, score(found.model) >= -0.6, found.plan.macs < found.plan.dense.macs
        (True, True, True)
    """
    _check(max_drop, quantity, evaluations, margin)
    check_kinds(planning=planning)
    planning = planning or Planning()
    if planning.init != "decompose":
        raise PlanError("search evaluates models without training them: it goes with init='decompose'")
    work = work_for_planning(model, Data.of(loader, example, planning), stats, executor, (quantity,))
    planned = planner(work, (quantity,))
    same: dict[str, Any] = {name: getattr(planning, name) for name in ("recalibrate", "batchnorm", "batches", "seed")}
    same |= {f"block {name}": [one.error for one in found] for name, found in work.blocks.items()}
    record = _Record(resume, same if resume is None else {"model": _checksum(model), **same})
    run = _Search(evaluate, planned, work, record, quantity, max_drop, margin)
    for _ in track(run.steps_until(evaluations), "Searching", total=evaluations):
        pass
    return run.result()


def _check(max_drop: Any, quantity: str, evaluations: Any, margin: Any) -> None:
    for name, value in (("max_drop", max_drop), ("margin", margin)):
        real(name, value, error=PlanError)
    one_of("quantity", quantity, QUANTITIES, error=PlanError)
    whole("evaluations", evaluations, 2, error=PlanError, why=": the dense model takes the first")


class _Search:
    """The budgets that were tried so far and what came of them."""

    def __init__(  # noqa: PLR0913
        self,
        evaluate: Evaluate,
        planned: Callable[[Budget | None], Plan],
        work: Work,
        record: _Record,
        quantity: str,
        max_drop: float,
        margin: float,
    ) -> None:
        self.evaluate, self.planned, self.work, self.record = evaluate, planned, work, record
        self.quantity, self.max_drop, self.margin = quantity, max_drop, margin
        self.steps: dict[str, Step] = {}  # by what the plan does
        self.tried: list[tuple[float, str | None]] = []  # a budget and the plan for it, where there is one
        self.hand: tuple[str, nn.Module] | None = None
        self.dense = Score(math.nan)

    def steps_until(self, evaluations: int) -> Iterator[int]:
        """Evaluate the dense model, then one smaller model after the other; yields once for each."""
        self.dense = self._score("dense", lambda: self.work.model)
        self._refuse_few_samples()
        yield 1
        while len(self.steps) + 1 < evaluations and (share := self._next()) is not None:
            try:
                plan = self.planned(Budget(**{self.quantity: share}))
            except BudgetError:
                self.tried.append((share, None))
                continue
            key = _key(plan)
            self.tried.append((share, key))
            if key not in self.steps:
                self._add(key, plan)
                yield len(self.steps) + 1

    def _next(self) -> float | None:
        """Return the next budget to try, at last one above the smallest that was kept; None where there is none."""
        kept = {key for key, step in self.steps.items() if step.kept}
        # A latency may come out a little above its budget.
        upper = min((min(share, self.steps[key].share) for share, key in self.tried if key in kept), default=1.0)
        lower = max((share for share, key in self.tried if share < upper and key not in kept), default=0.0)
        if upper - lower > RESOLUTION:
            return (lower + upper) / 2
        above = upper + NEIGHBOUR
        alone = not any(upper < step.share <= above for step in self.steps.values())
        return above if alone and above < 1 and all(share != above for share, _ in self.tried) else None

    def _add(self, key: str, plan: Plan) -> None:
        """Evaluate the model of a plan and judge all models again."""
        small: list[nn.Module] = []

        def built() -> nn.Module:
            small.append(build(self.work, plan))
            return small[0]

        score = self._score(key, built)
        share = _share(plan, self.quantity)
        drop = self.dense.value - score.value
        self.steps[key] = Step(plan, share, score.value, drop, standard_error(self.dense, score))
        ordered = sorted(self.steps.items(), key=lambda item: item[1].share)
        for (name, step), fitted in zip(ordered, monotone([step.drop for _, step in ordered]), strict=True):
            sure = fitted + self.margin * step.error <= self.max_drop
            self.steps[name] = replace(step, kept=sure and step.drop <= self.max_drop)
        if small and self._best() == key:
            self.hand = key, small[0]

    def _score(self, key: str, build: Callable[[], nn.Module]) -> Score:
        """Return the recorded score of a model, or build and evaluate it and record that."""
        known = self.record.scores.get(key)
        if known is not None:
            return known
        small = build()
        with evaluating(small), torch.no_grad():
            score = Score.of(self.evaluate(small), "dense" if key == "dense" else "compressed")
        self.record.add(key, score)
        return score

    def _refuse_few_samples(self) -> None:
        least = self.margin * standard_error(self.dense, self.dense)
        if least > self.max_drop:
            count = self.dense.count or 0
            power = 1 if self.dense.samples is not None else 2
            needed = math.ceil(count * (least / self.max_drop) ** power) if self.max_drop else "more"
            raise BudgetError(
                f"{count:,} samples are too few to show that a score falls by at most {self.max_drop:g}: "
                f"{self.margin:g} standard errors are {least:.4g} already for a model as good as the dense one; "
                f"evaluate on {needed} samples, return a score per sample, or take the score at its word with margin=0"
            )

    def _best(self) -> str | None:
        return min(
            (key for key, step in self.steps.items() if step.kept), default=None, key=lambda k: self.steps[k].share
        )

    def result(self) -> SearchResult:
        """Return the smallest model that keeps the promise."""
        best = self._best()
        if best is None:
            raise BudgetError(self._closest())
        plan = self.steps[best].plan
        small = self.hand[1] if self.hand is not None and self.hand[0] == best else build(self.work, plan)
        steps = tuple(self.steps.values())
        return SearchResult(small, plan, steps, self.dense.value, self.quantity, self.max_drop, self.margin)

    def _closest(self) -> str:
        wanted = f"no smaller model was found whose score falls by at most {self.max_drop:g}"
        if not self.steps:
            return f"{wanted}: no plan is smaller than the dense model"
        step = min(self.steps.values(), key=lambda step: step.drop + self.margin * step.error)
        error = f", with a standard error of {step.error:.4g}" if step.error else ""
        return (
            f"{wanted} from {self.dense.value:.6g}: the closest, with {self.quantity}={step.share:.4f}, falls by "
            f"{step.drop:.4g}{error}; allow a larger drop, try more methods, or train the smaller model"
        )


class _Record:
    """The scores of a search, kept in a file where there is one."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.scores: dict[str, Score] = {}
        if path is not None and os.path.exists(path):
            self.scores = self._read(path)

    def add(self, key: str, score: Score) -> None:
        """Keep a score."""
        self.scores[key] = score
        if self.path is None:
            return
        scores = {key: score.data() for key, score in self.scores.items()}
        text = json.dumps({"rankfold_search": VERSION, "settings": self.settings, "scores": scores})
        try:
            with atomic_path(self.path) as unfinished:
                unfinished.write_text(text)
        except OSError as error:
            raise StoreError(f"{os.fspath(self.path)} cannot be written: {error}") from error

    def _read(self, path: str | os.PathLike[str]) -> dict[str, Score]:
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            version, settings = data["rankfold_search"], dict(data["settings"])
            scores = {key: Score.of_data(score) for key, score in data["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(
                f"{os.fspath(path)} is not the record of a search: {error!r}; give another path"
            ) from error
        differs = [name for name, value in self.settings.items() if settings.get(name) != value]
        if version != VERSION or differs:
            raise StoreError(
                f"{os.fspath(path)} is the record of a search with another {(differs or ['version'])[0]}: give another "
                "path, or delete it"
            )
        return scores


def _share(plan: Plan, quantity: str) -> float:
    """Return what a plan keeps of a quantity: a latency as it was measured, where it was."""
    if quantity == "latency" and plan.measured is not None:
        return plan.measured.kept
    return float(plan.amounts[quantity] / plan.dense[quantity])


def _key(plan: Plan) -> str:
    """Return what tells plans apart by what they do."""
    done = [(n, c.method, c.rank, sorted(c.options.items())) for n, c in plan.layers.items() if c.method != "dense"]
    return f"{plan.metric} {zlib.crc32(repr(done).encode()):08x}"


def _checksum(model: nn.Module) -> str:
    """Return a checksum of the values of a model."""
    total = 0
    for name, tensor in model.state_dict().items():
        total = zlib.crc32(name.encode(), total)
        if (
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and not (tensor.is_meta or tensor.is_quantized)
        ):
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total = zlib.crc32(values.numpy().data, total)
    return f"{total:08x}"
