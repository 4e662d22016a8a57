"""Accuracy against MACs: SVD training beside truncation, TRP, Pufferfish, Cuttlefish, DLRT and LC, for equal epochs.

    python -m reproduce.svd_training.run                     # what results/ lacks, then tables and pictures
    python -m reproduce.svd_training.run --only pretrained   # one file of results/: a network, or what was tried on it
    python -m reproduce.svd_training.run --quick             # two batches of everything, nothing is written
    python -m reproduce.svd_training.run --redraw            # tables and pictures from results/
    python -m reproduce.svd_training.run --float32           # no autocast: faster where there is no bfloat16 arithmetic

Rows are written as they are done, a file for each network, and the training before the cut is kept in the cache folder
after each epoch: what was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.harness import Row
from reproduce.svd_training import drawing, experiment
from reproduce.svd_training.experiment import Task

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BUDGETS = (0.8, 0.5, 0.35, 0.25)  # shares of the dense MACs
BEFORE, AFTER = 10, 5  # epochs of training before the cut and after it; the same sum for every row
OWN = "own"  # the ranks that a method has found itself

TASKS: Mapping[str, Callable[[], Task]] = {
    "pretrained": lambda: experiment.resnet20(pretrained=True),
    "scratch": lambda: experiment.resnet20(pretrained=False),
    "mnist": experiment.mnist_network,
    "fashion": experiment.fashion_mlp,
}


@dataclass(frozen=True)
class Setting:
    """One training before the cut: a method with its options, or "one shot" for none at all."""

    method: str
    split: str = "spatial"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The setting in words: the key of its rows."""
        return " ".join([self.method, self.split, *(f"{key}={value}" for key, value in self.options.items())])


def _svd(kind: str, sparsity: float, split: str = "spatial", **options: Any) -> Setting:
    return Setting("svd", split, {"kind": kind, "sparsity": sparsity, **options})


# The weights of the penalties are the paper's for ResNet-20.
SETTINGS = (
    Setting("one shot"),
    _svd("hoyer", 0.1),
    _svd("l1", 0.3),
    _svd("hoyer_square", 0.01),
    Setting("trp", options={"energy": 0.98}),
    Setting("cuttlefish", options={"earliest": BEFORE // 2, "window": 3, "smoothing": 3}),
    Setting("dlrt", options={"tolerance": 0.2}),
    Setting("lc", options={"strength": 1.0}),
    _svd("hoyer", 0.07, "channel"),
)
# Of these one seed is run, after all of those: each answers one question, on the network where it is asked.
UNBOUND = _svd("hoyer", 0.1, orthogonality=0.0)
OTHERS = (
    UNBOUND,
    _svd("hoyer", 0.1, orthogonality="retraction"),
    _svd("hoyer", 0.02),
    _svd("hoyer", 0.3),
    Setting("pufferfish", options={"warmup": BEFORE, "first": 0, "last": 0}),
    Setting("nuclear", options={"strength": 0.1}),
)
LINEAR = tuple(setting for setting in SETTINGS if setting.split != "channel")  # Linear layers have one form


@dataclass(frozen=True)
class Run:
    """What one file of `results/` holds.

    `settings` get every seed, `once` the first seed alone; `dense` says whether the dense network is trained, too, and
    `lr` is a learning rate other than the network's own.
    """

    network: str
    settings: tuple[Setting, ...] = SETTINGS
    once: tuple[Setting, ...] = ()
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[float, ...] = BUDGETS
    dense: bool = True
    lr: float | None = None

    def task(self, *, autocast: bool) -> Task:
        """Load the network and its data."""
        task = TASKS[self.network]()
        return replace(task, lr=self.lr or task.lr, autocast=task.autocast and autocast)


RUNS: Mapping[str, Run] = {
    "pretrained": Run("pretrained", once=(UNBOUND,)),
    "scratch": Run("scratch"),
    # further cuts, where a quarter costs nothing
    "mnist": Run("mnist", seeds=(0, 1, 2), budgets=(*BUDGETS, 0.1)),
    "fashion": Run("fashion", LINEAR, OTHERS, seeds=(0, 1, 2), budgets=(*BUDGETS, 0.1, 0.05)),
    "tried/scratch_lr_0.001": Run(
        "scratch", (Setting("one shot"), _svd("hoyer", 0.1), _svd("l1", 0.3), _svd("hoyer", 0.02)), lr=1e-3
    ),
    "tried/scratch_late": Run("scratch", (_svd("hoyer", 0.1, late=BEFORE // 2),), budgets=(0.5, 0.25), dense=False),
    "tried/scratch_until": Run(
        "scratch", (_svd("hoyer_square", 0.01, until=0.5), _svd("hoyer", 0.1, until=0.5)), budgets=(0.5,), dense=False
    ),
    "tried/pretrained_lr_0.0003": Run(
        "pretrained", (_svd("l1", 0.3), _svd("hoyer_square", 0.01)), budgets=(0.5, 0.25), dense=False, lr=3e-4
    ),
}


@dataclass(frozen=True)
class Effort:
    """How long to train: all of it, or just enough to see that it runs."""

    before: int = BEFORE
    after: int = AFTER
    budgets: tuple[float | str, ...] = BUDGETS
    checkpoints: bool = True


def late(first: int, epochs: int, steps: int) -> Callable[[int], float]:
    """Return a schedule that is 0 for the first epochs and rises to 1 at the end, for that many steps an epoch."""
    return lambda step: max(0.0, step / steps - first) / max(epochs - first, 1)


@dataclass
class Until:
    """A schedule that is 1 until a cut to a share of the MACs loses little, and again whenever it would lose more.

    The cut is looked at four times an epoch; little is a relative error of the weights (root mean square over the
    layers) of `error`.
    """

    run: rf.train.SVDTraining
    share: float
    example: torch.Tensor
    steps: int  # an epoch
    error: float = 0.1
    factor: float = 1.0

    def __call__(self, step: int) -> float:
        """Return the factor of the sparsity."""
        if step % self.steps % math.ceil(self.steps / 4) == 0:
            with torch.no_grad():
                plan = self.run.prune(budget=rf.Budget(macs=self.share), example=self.example)[1]
            self.factor = float(plan.error is None or plan.error > self.error)
        return self.factor


def rows_of(task: Task, file: str, setting: Setting, seed: int, effort: Effort) -> Iterator[tuple[str, Row]]:
    """Yield the key and the row of every budget of a setting; the training before the cut is done once."""
    name = RUNS[file].network
    key = f"{name} {setting.name} seed {seed}"
    start = task.start(seed)
    stats = rf.measure(start, example=task.example)
    folder = datasets.made_in()
    folder.mkdir(parents=True, exist_ok=True)
    place = key if file == name else f"{file.replace('/', ' ')} {key}"
    checkpoint = folder / f"svd_training {place}.checkpoint" if effort.checkpoints else None
    if setting.method == "one shot":
        # from scratch there is nothing to cut before the network is trained
        before = 0 if name == "pretrained" else effort.before
        log = experiment.train(task, start, None, epochs=before, seed=seed, checkpoint=checkpoint)
        run = rf.train.Pufferfish(start, first=0, last=0, split=setting.split)  # for its cut alone
    else:
        run = _method(setting, start, task, effort, steps=len(task.batches(seed)))
        log = experiment.train(task, run.model, run, epochs=effort.before, seed=seed, checkpoint=checkpoint)
    common = {
        **{"task": name, "method": setting.method, "split": setting.split, "options": dict(setting.options)},
        **{"seed": seed, "dense_macs": stats.macs, "dense_params": stats.params, "before": task.score(run.model)},
        "autocast": task.autocast,
    }
    spectrum = {layer: [round(v, 5) for v in values.tolist()] for layer, values in run.spectrum().items()}
    yield f"{key} trained", {**common, "budget": None, "log": log, "spectrum": spectrum}
    after = effort.before + effort.after - len(log)
    for budget in effort.budgets:
        yield f"{key} {budget}", {**common, **_cut(task, run, budget, epochs=after, seed=seed)}
    if checkpoint is not None and checkpoint.exists():
        checkpoint.unlink()


def _method(setting: Setting, start: nn.Module, task: Task, effort: Effort, *, steps: int) -> rf.train.TrainingMethod:
    """Return the method of a setting on a model, for that many steps an epoch."""
    options = dict(setting.options)
    first, share = options.pop("late", None), options.pop("until", None)
    run = rf.train.training_method(setting.method, start, split=setting.split, **options)
    if isinstance(run, rf.train.SVDTraining) and first is not None:
        run.schedule = late(first, effort.before, steps)
    if isinstance(run, rf.train.SVDTraining) and share is not None:
        run.schedule = Until(run, share, task.example, steps)
    return run


def _cut(task: Task, run: rf.train.TrainingMethod, budget: float | str, *, epochs: int, seed: int) -> Row:
    """Return what one cut to a budget leads to."""
    limit = {} if budget == OWN else {"budget": rf.Budget(macs=budget)}
    try:
        small, plan = run.prune(**limit, example=task.example)
    except rf.RankfoldError as problem:
        return {"budget": budget, "refused": str(problem)}
    row: Row = {"budget": budget, "macs": plan.macs, "params": plan.params}
    row["ranks"] = {layer: choice.rank for layer, choice in plan.layers.items()}
    if isinstance(run, rf.train.SVDTraining):
        row["cut by values"] = task.score(run.prune_by_values(plan))
    return {**row, **experiment.tuned(task, small, epochs=epochs, seed=seed)}


def dense_row(task: Task, name: str, seed: int, effort: Effort) -> Row:
    """Return the dense network trained for the same number of epochs."""
    model: nn.Module = task.start(seed)
    stats = rf.measure(model, example=task.example)
    row = {"task": name, "method": "dense", "split": "", "options": {}, "seed": seed, "budget": 1.0}
    row |= {"macs": stats.macs, "params": stats.params, "dense_macs": stats.macs, "dense_params": stats.params}
    row["autocast"] = task.autocast
    row["cut"] = task.score(model)
    row["log"] = experiment.train(task, model, None, epochs=effort.before + effort.after, seed=seed)
    return {**row, "tuned": task.score(model)}


def missing(rows: harness.Rows, key: str, setting: Setting, effort: Effort) -> Effort:
    """Return the effort for the budgets of a setting that have no row yet."""
    wanted = [*effort.budgets, *([] if setting.method in ("svd", "one shot") else [OWN])]
    return replace(effort, budgets=tuple(budget for budget in wanted if f"{key} {budget}" not in rows))


def kept_rows(file: str) -> harness.Rows:
    """Return the rows of a file of `results/`, none where there is no file yet."""
    path = RESULTS / f"{file}.json"
    rows: harness.Rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return rows


def measure(file: str, effort: Effort, *, quick: bool, autocast: bool) -> None:
    """Measure what a file of `results/` lacks, the settings in the order of their table; a quick run keeps nothing."""
    run, rows = RUNS[file], {} if quick else kept_rows(file)

    def keep(key: str, row: Row) -> None:
        rows[key] = row
        if not quick:
            path = RESULTS / f"{file}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            harness.store(rows, path)
        print(drawing.line(row), flush=True)

    task = run.task(autocast=autocast)
    task = task.quick() if quick else task
    seeds = run.seeds[: 1 if quick else None]
    for seed in seeds if run.dense else ():
        if f"{run.network} dense seed {seed}" not in rows:
            keep(f"{run.network} dense seed {seed}", dense_row(task, run.network, seed, effort))
    for seed, setting in [*itertools.product(seeds, run.settings), *itertools.product(seeds[:1], run.once)]:
        left = missing(rows, f"{run.network} {setting.name} seed {seed}", setting, effort)
        if left.budgets:
            for key, row in rows_of(task, file, setting, seed, left):
                keep(key, row)


def main() -> None:
    """Measure, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redraw", action="store_true", help="only draw what results/ holds")
    parser.add_argument("--quick", action="store_true", help="two batches of everything; nothing is written")
    parser.add_argument("--only", choices=RUNS, help="the rows of one file of results/")
    parser.add_argument("--float32", action="store_true", help="no autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if not words.redraw:
        for file in [words.only] if words.only else RUNS:
            effort = Effort(1, 1, (0.5,), checkpoints=False) if words.quick else Effort(budgets=RUNS[file].budgets)
            measure(file, effort, quick=words.quick, autocast=not words.float32)
    if not words.quick:
        rows = {key: row for name in TASKS for key, row in kept_rows(name).items()}
        drawing.write_table(rows, HERE / "table.md")
        drawing.write_plot(rows, HERE / "plot.png")


if __name__ == "__main__":
    main()
