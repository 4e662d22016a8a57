"""ResNet-20 on CIFAR-10, compressed at equal MACs by each method alone and by the planner free to mix.

    python -m reproduce.cifar_resnet.run            # every row that results.json lacks, then table.md and plot.png
    python -m reproduce.cifar_resnet.run --redraw   # table.md and plot.png from results.json

Rows are written as they are done, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.cifar_resnet import drawing
from reproduce.cifar_resnet.model import normalised, pretrained
from reproduce.harness import Row
from reproduce.training import packed, paired

BUDGETS = (0.75, 0.5, 0.35)  # shares of the dense MACs
SINGLE = ("svd", "cp", "tucker", "tt")
METHODS = {**{name: (name,) for name in SINGLE}, "mix": SINGLE}
WITH_SPECTRA = {"svd": ("svd",), "tucker": ("tucker",), "mix": ("svd", "tucker")}  # EVBMF reads singular values
CLASSIFIER_KEPT = "uniform, classifier kept"
RULES = {"optimal": METHODS, "uniform": METHODS, CLASSIFIER_KEPT: {"svd": ("svd",)}, "evbmf": WITH_SPECTRA}
TUNED = ("mix", "cp", "svd")  # with optimal ranks, at each budget; and the dense network
SEED = 0
CALIBRATION = 2_000  # training images that BatchNorm is re-estimated on
EPOCHS, BATCH, LEARNING_RATE = 1, 128, 1e-3


class Batches:
    """Training images as the network was trained on them: 4 black pixels around, a random crop, a random flip.

    The same batches come with the same seed, others in each further epoch. With `changed=False` the images
    come as they are.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, seed: int, size: int = BATCH, changed: bool = True) -> None:
        self.images, self.labels = F.pad(images, (4, 4, 4, 4)), labels
        self.size, self.seed, self.changed, self.epoch = size, seed, changed, 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch; the last images that fill none are left out."""
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the next epoch."""
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.images), generator=generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            cropped = self._cropped(chosen, generator) if self.changed else self.images[chosen, :, 4:-4, 4:-4]
            yield normalised(cropped), self.labels[chosen]

    def _cropped(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        top, left = torch.randint(0, 9, (2, len(chosen), 1), generator=generator)
        flip = torch.rand(len(chosen), 1, generator=generator) < 0.5
        pixels = torch.arange(32)
        rows, columns = top + pixels, left + torch.where(flip, pixels.flip(0), pixels)
        cropped = self.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2)


class Experiment:
    """The data, the dense network and what it costs."""

    def __init__(self) -> None:
        self.data = datasets.cifar10()
        self.dense = pretrained(datasets.resnet20_weights())
        self.test = normalised(self.data.test_images)
        self.stats = rf.measure(self.dense, example=self.test[:1])
        self.dense_correct = self.correct(self.dense)

    def correct(self, model: nn.Module) -> Tensor:
        """Return which test images the model classifies rightly."""
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(batch).argmax(dim=1) for batch in self.test.split(250)])
        return found == self.data.test_labels

    def scored(self, model: nn.Module) -> Row:
        """Return top-1 and its difference to the dense network on the same images, in per cent."""
        right = self.correct(model)
        difference, error = paired(right, self.dense_correct)
        return {
            "top1": 100 * right.double().mean().item(),
            "difference": difference,
            "se": error,
            "right": packed(right),
        }

    def reestimated(self, model: nn.Module, *, changed: bool = True) -> Row:
        """Re-estimate BatchNorm in place, on the same images in every row, and return the score."""
        images, labels = self.data.train_images[:CALIBRATION], self.data.train_labels[:CALIBRATION]
        batches = Batches(images, labels, seed=SEED, size=200, changed=changed)
        rf.train.reestimate_batchnorm(model, batches, batches=len(batches))
        return self.scored(model)

    def tuned(self, model: nn.Module) -> Row:
        """Fine-tune in place with the dense network as the teacher, and return the score."""
        start = time.perf_counter()
        batches = Batches(self.data.train_images, self.data.train_labels, seed=SEED)
        recipe = rf.train.Recipe(batchnorm=0, seed=SEED)  # BatchNorm has been re-estimated
        rf.train.fit(model, batches, teacher=self.dense, epochs=EPOCHS, lr=LEARNING_RATE, recipe=recipe)
        return {**self.scored(model), "seconds": time.perf_counter() - start}


def planned(run: Experiment, budget: float, method: str, rule: str) -> Row:
    """Return the row of one setting: its plan, and what the compressed network scores without training."""
    row: Row = {"budget": budget, "method": method, "rule": rule, "seed": SEED}
    start = time.perf_counter()
    try:
        plan = rf.plan(
            run.dense,
            budget=rf.Budget(macs=budget),
            stats=run.stats,
            methods=RULES[rule][method],
            exclude=("linear",) if rule == CLASSIFIER_KEPT else (),
            planning=rf.Planning(rule=rule.split(",")[0], seed=SEED),
        )
    except rf.BudgetError as refusal:
        return {**row, "refused": str(refusal)}
    middle = time.perf_counter()
    small = rf.apply(run.dense, plan, seed=SEED)
    seconds = {"plan": middle - start, "apply": time.perf_counter() - middle}
    return row | {
        "macs": plan.macs,
        "macs_kept": plan.macs / plan.dense.macs,
        "params": plan.params,
        "params_kept": plan.params / plan.dense.params,
        "predicted": sum((choice.error or 0.0) ** 2 for choice in plan.layers.values()),
        "measured": sum(weight_errors(run.dense, small).values()),
        "used": dict(Counter(label(choice) for choice in plan.layers.values())),
        "one_shot": run.scored(small),
        "batchnorm": run.reestimated(small),
        "seconds": seconds,
        "plan": json.loads(plan.to_json()),
    }


def tuned(run: Experiment, row: Row) -> Row:
    """Return the score of a row's network after fine-tuning: its plan is applied anew, BatchNorm re-estimated."""
    small = pretrained(datasets.resnet20_weights())
    if "plan" in row:
        small = rf.apply(small, rf.Plan.from_json(json.dumps(row["plan"])), seed=SEED)
    run.reestimated(small)
    return run.tuned(small)


def replaced(row: Row) -> dict[str, Row]:
    """Return what a row's plan puts in the place of each layer that it changes: rows with the same are the same."""
    layers = row.get("plan", {"layers": {}})["layers"]
    return {name: choice for name, choice in layers.items() if choice["method"] != "dense"}


def label(choice: rf.Choice) -> str:
    """Return the method of a choice with its options, such as "svd spatial"."""
    named = {"separable": {True: "separable", False: ""}}
    words = [named.get(name, {}).get(value, value) for name, value in choice.options.items()]
    return " ".join([choice.method, *(word for word in words if word and isinstance(word, str))])


def weight_errors(dense: nn.Module, small: nn.Module) -> dict[str, float]:
    """Return the squared relative error of every replaced weight."""
    errors = {}
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, new = layer.weight.detach().double(), small.get_submodule(name).weight.detach().double()
            errors[name] = ((new - weight).norm() / weight.norm()).item() ** 2
    return errors


def dense_row(run: Experiment) -> Row:
    """Return the row of the dense network: untouched, and after re-estimation, also on images as they are."""
    model = pretrained(datasets.resnet20_weights())
    row = {"method": "dense", "seed": SEED, "macs": run.stats.macs, "params": run.stats.params}
    row["one_shot"] = run.scored(model)
    row["batchnorm_unchanged_images"] = run.reestimated(model, changed=False)
    return row | {"batchnorm": run.reestimated(model)}


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Measure what is missing: every row first, then the fine-tuning, which takes longest."""
    run = Experiment()
    settings = {f"{b} {m} {r}": (b, m, r) for r in RULES for b in BUDGETS for m in RULES[r]}
    for key in ["dense", *settings]:
        if key not in rows:
            keep(key, dense_row(run) if key == "dense" else planned(run, *settings[key]))
    for key in ["dense", *(f"{budget} {method} optimal" for method in TUNED for budget in BUDGETS)]:
        if "tuned" not in rows[key] and "refused" not in rows[key]:
            twins = [row for row in rows.values() if "tuned" in row and replaced(row) == replaced(rows[key])]
            keep(key, rows[key] | {"tuned": twins[0]["tuned"] if twins else tuned(run, rows[key])})


QUICK = {
    "BUDGETS": (0.5,),
    "RULES": {rule: {"svd": ("svd",)} for rule in RULES}
    | {"optimal": {"svd": ("svd",), "mix": ("svd", "tucker", "tt")}},
    "TUNED": ("mix",),
}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
