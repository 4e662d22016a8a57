"""ResNet-20 on CIFAR-10 without a gradient step: planned on weights, on outputs, and recalibrated, at equal MACs.

    python -m reproduce.planning.resnet20.run                  # every row that results.json lacks, then the table
    python -m reproduce.planning.resnet20.run --only untrained # the same without the rows that are trained
    python -m reproduce.planning.resnet20.run --only mix       # the planner's mix alone, a few minutes
    python -m reproduce.planning.resnet20.run --redraw         # table.md and plot.png from results.json

Rows are written as they are done, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.pipeline import measure_damage
from rankfold.planning import Candidates, candidates
from rankfold.recalibration import recalibrate
from reproduce import harness
from reproduce.cifar_resnet.run import Batches, Experiment, label
from reproduce.harness import Keep, Row, Rows
from reproduce.planning.resnet20 import drawing

BUDGETS = (0.75, 0.5, 0.35, 0.25)  # shares of the dense MACs
SINGLE = ("svd", "cp", "tucker")
METHODS = {**{name: (name,) for name in SINGLE}, "svd+tucker": ("svd", "tucker"), "mix": SINGLE}
CALIBRATION, BATCH = 1_000, 100  # training images that everything without training is made from
SEED = 0
GRADES = ("weights", "outputs")
EPOCHS, TRAINING_BATCH, LEARNING_RATE = 3, 128, 1e-3


@dataclass(frozen=True)
class Setting:
    """How plans are made: one set of candidates, a row per budget."""

    method: str
    rule: str = "optimal"
    metric: str = "outputs"
    objective: str = "squares"

    def key(self, budget: float) -> str:
        """Return the key of a row."""
        return f"{budget} {self.method} {self.rule} {self.metric} {self.objective}"

    @property
    def recalibrated(self) -> bool:
        """Whether its models are recalibrated too, which takes longer than all the rest."""
        return self.metric in GRADES and (self.rule == "optimal" or self.method in ("svd", "mix"))


COMPARED = [
    *(Setting(method, metric=metric) for method in METHODS for metric in GRADES),
    *(Setting(method, "uniform", metric) for method in ("svd", "cp", "mix") for metric in GRADES),
    *(Setting("svd+tucker", rule, metric) for rule in ("energy", "evbmf", "uniform") for metric in GRADES),
    Setting("mix", objective="energy"),
    Setting("mix", metric="fisher"),
    Setting("mix", metric="fisher", objective="loss"),
    Setting("mix", metric="fisher", objective="tempered"),
    Setting("mix", objective="calibrated"),
    *(Setting("svd", metric=metric) for metric in ("fisher", "fwsvd", "asvd", "whitening")),
]
MIX = [Setting("mix", metric=metric) for metric in GRADES]
TUNED = [Setting("mix", objective="calibrated"), Setting("mix", metric="weights"), Setting("svd")]


class Study(Experiment):
    """The data, the dense network, and what 1,000 training images say of it."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = self.data.train_images[:CALIBRATION], self.data.train_labels[:CALIBRATION]
        self.calibration = list(Batches(images, labels, seed=SEED, size=BATCH))
        start = time.perf_counter()
        self.stats = rf.measure(self.dense, self.calibration, moments=True, loss=F.cross_entropy)
        self.seconds = time.perf_counter() - start
        self.wanted = self.outputs(self.dense)

    def candidates(self, setting: Setting) -> Candidates:
        """Return what every layer could become."""
        calibrated = setting.objective == "calibrated"
        found = candidates(
            self.dense,
            quantities="macs",
            stats=self.stats,
            planning=rf.Planning(
                methods=METHODS[setting.method],
                rule=setting.rule,
                metric=setting.metric,
                objective="squares" if calibrated else setting.objective,
                seed=SEED,
            ),
        )
        return measure_damage(found, self.dense, self.calibration[:2], stats=self.stats) if calibrated else found

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """Return the outputs of a model on the calibration images."""
        return torch.cat([model.eval()(images) for images, _ in self.calibration]).double()

    def stage(self, model: nn.Module) -> Row:
        """Return the score of a model and the relative error of its outputs on the calibration images."""
        error = (self.outputs(model) - self.wanted).norm() / (self.wanted - self.wanted.mean(0)).norm()
        return {**self.scored(model), "output_error": error.item()}

    def with_batchnorm(self, model: nn.Module) -> nn.Module:
        """Return a copy with BatchNorm re-estimated on the calibration images."""
        other = copy.deepcopy(model)
        rf.train.reestimate_batchnorm(other, self.calibration, batches=len(self.calibration))
        return other


def untrained(run: Study, setting: Setting, budget: float, found: Candidates) -> Row:
    """Return the row of one plan: as it is decomposed, with BatchNorm re-estimated, recalibrated, with both."""
    row: Row = {"budget": budget, **vars(setting), "seed": SEED}
    try:
        plan = found.plan(rf.Budget(macs=budget))
    except rf.BudgetError as refusal:
        return {**row, "refused": str(refusal)}
    start = time.perf_counter()
    small = rf.apply(run.dense, plan, stats=run.stats, seed=SEED)
    row |= {
        "macs": plan.macs,
        "macs_kept": plan.macs / plan.dense.macs,
        "params": plan.params,
        "params_kept": plan.params / plan.dense.params,
        "predicted": plan.output_error,
        "used": dict(Counter(label(choice) for choice in plan.layers.values())),
        "seconds": {"apply": time.perf_counter() - start},
        "one_shot": run.stage(small),
        "batchnorm": run.stage(run.with_batchnorm(small)),
        "plan": json.loads(plan.to_json()),
    }
    if setting.recalibrated:
        start = time.perf_counter()
        again = recalibrate(small, run.dense, run.calibration, seed=SEED)
        row["seconds"]["recalibrate"] = time.perf_counter() - start
        row |= {"recalibrated": run.stage(again), "both": run.stage(run.with_batchnorm(again))}
    return row


def tuned(run: Study, row: Row) -> Row:
    """Return the score of a row's network after fine-tuning from where the calibration images leave it."""
    plan = rf.Plan.from_json(json.dumps(row["plan"]))
    small = rf.apply(run.dense, plan, stats=run.stats, seed=SEED)
    small = recalibrate(small, run.dense, run.calibration, seed=SEED)
    start = time.perf_counter()
    batches = Batches(run.data.train_images, run.data.train_labels, seed=SEED, size=TRAINING_BATCH)
    recipe = rf.train.Recipe(batchnorm=0, seed=SEED)
    rf.train.fit(small, batches, teacher=run.dense, epochs=EPOCHS, lr=LEARNING_RATE, recipe=recipe)
    return {**run.stage(small), "seconds": time.perf_counter() - start}


def _untrained(run: Study, settings: list[Setting], rows: Rows, keep: Keep) -> None:
    if "dense" not in rows:
        costs = {"macs": run.stats.macs, "params": run.stats.params, "seconds": {"measure": run.seconds}}
        after = run.stage(run.with_batchnorm(run.dense))
        keep("dense", {"method": "dense", "seed": SEED, **costs, "one_shot": run.stage(run.dense), "batchnorm": after})
    for setting in settings:
        missing = [budget for budget in BUDGETS if setting.key(budget) not in rows]
        start = time.perf_counter()
        found = run.candidates(setting) if missing else None
        seconds = time.perf_counter() - start
        for budget in missing:
            row = untrained(run, setting, budget, found)
            row.setdefault("seconds", {})["candidates"] = seconds
            keep(setting.key(budget), row)


def mix(rows: Rows, keep: Keep) -> None:
    """Measure the planner's mix, on weights and on outputs."""
    _untrained(Study(), MIX, rows, keep)


def without_training(rows: Rows, keep: Keep) -> None:
    """Measure every row that takes no gradient step."""
    _untrained(Study(), [*MIX, *(setting for setting in COMPARED if setting not in MIX)], rows, keep)


def measure(rows: Rows, keep: Keep) -> None:
    """Measure what is missing: every row first, then the fine-tuning, which takes longest."""
    without_training(rows, keep)
    run = Study()
    for key in [setting.key(budget) for setting in TUNED for budget in BUDGETS]:
        if "tuned" not in rows[key] and "refused" not in rows[key]:
            keep(key, rows[key] | {"tuned": tuned(run, rows[key])})


QUICK = {
    "BUDGETS": (0.5,),
    "METHODS": METHODS | {"mix": ("svd", "tucker")},
    "COMPARED": [Setting("svd", "uniform"), Setting("mix", metric="fisher"), TUNED[0]],
    "TUNED": TUNED[:1],
    "CALIBRATION": 100,
    "EPOCHS": 1,
}

if __name__ == "__main__":
    parts = {"mix": mix, "untrained": without_training}
    harness.main(__doc__, Path(__file__).parent, measure, drawing, parts=parts, quick=QUICK)
