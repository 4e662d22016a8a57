"""A sentence transformer made smaller without training: by its weights, by its data, and by what its outputs feel.

    python -m reproduce.planning.minilm.run            # every row that results.json lacks, then table.md and plot.png
    python -m reproduce.planning.minilm.run --redraw   # table.md and plot.png from results.json

Rows are written as they are done, so that what was stopped goes on where it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold as rf
from rankfold.recalibration import Refitting
from reproduce import datasets, harness
from reproduce.harness import Row
from reproduce.planning.minilm import drawing
from reproduce.planning.minilm.model import Judge, Texts, linear_params, pretrained, projected

RATIOS = (0.7, 0.5, 0.9, 0.6, 0.8)
TEXTS = 1_000
SHORT = 32  # words of a passage of Shakespeare
LINEAR = "bert.encoder.*"
PER_PASS = 6  # layers that are recalibrated on one run: those of a block
DAMPING = 10.0  # the layers stay near what they were made as: the texts need not be like those in use


@dataclass(frozen=True)
class Rule:
    """How ranks and factors are chosen."""

    metric: str
    rule: str = "uniform"
    objective: str = "squares"
    recalibrate: bool = False


RULES = {
    "plain SVD": Rule("weights"),
    "plain SVD, allocated": Rule("weights", "optimal"),
    "FWSVD": Rule("fwsvd"),
    "FWSVD, allocated": Rule("fwsvd", "optimal"),
    "ASVD": Rule("asvd"),
    "ASVD, allocated": Rule("asvd", "optimal"),
    "whitening": Rule("whitening"),
    "whitening, allocated": Rule("whitening", "optimal"),
    "outputs, allocated": Rule("outputs", "optimal"),
    "loss, allocated": Rule("fisher", "optimal", "loss"),
    "tempered loss, allocated": Rule("fisher", "optimal", "tempered"),
    "ours": Rule("fisher", "optimal", "tempered", recalibrate=True),
}
# measured before the others
FIRST = ("plain SVD", "FWSVD", "ASVD", "whitening", "loss, allocated", "tempered loss, allocated", "ours")


class Experiment:
    """The model, the judge, and what was measured on each set of texts."""

    def __init__(self) -> None:
        """Load the model and tokenise the pairs that are judged on: two of three, in their order."""
        torch.set_num_threads(1)
        self.pairs = datasets.stsb_dev()
        self.model = pretrained()
        self.judge = Judge([pair for place, pair in enumerate(self.pairs) if place % 3])

    @cache  # noqa: B019 - one experiment lives as long as its process
    def texts(self, name: str) -> Texts:
        """Return the texts of a calibration set: of the pairs that are not judged on, or of Shakespeare."""
        if name == "STS-B":
            return Texts.of([text for pair in self.pairs[::3] for text in (pair.first, pair.second)], 32)
        passages = datasets.tinyshakespeare().split("\n\n")
        chosen = passages[:: len(passages) // TEXTS][:TEXTS]
        return Texts.of([" ".join(passage.split()[:SHORT]) for passage in chosen], 32)

    @cache  # noqa: B019
    def stats(self, name: str) -> rf.Stats:
        """Return what the inputs and gradients of all layers are like on a calibration set."""
        return rf.measure(self.model, self.texts(name).batches, moments=True, mask="attention_mask", loss=projected)

    def dense(self) -> Row:
        """Return the row of the model as it is, judged on the same pairs as the others and on all of them."""
        both = {"spearman": self.judge(self.model), "all pairs": Judge(self.pairs)(self.model)}
        return {"rule": "dense", "texts": "", "ratio": 1.0, "linear": linear_params(self.model), **both}

    def run(self, name: str, texts: str, ratio: float) -> Row:
        """Return the row of one rule at one ratio."""
        rule, start = RULES[name], time.perf_counter()
        stats = self.stats(texts) if texts else None
        plan = rf.plan(
            self.model,
            budget=self.budget(ratio),
            stats=stats,
            methods="svd",
            include=LINEAR,
            planning=rf.Planning(rule=rule.rule, metric=rule.metric, objective=rule.objective),
        )
        small = rf.apply(self.model, plan, stats=stats)
        row: Row = {"rule": name, "texts": texts, "ratio": ratio, "linear": linear_params(small), "error": plan.error}
        if rule.recalibrate:
            small = self.recalibrated(small, texts, row)
        row["seconds"] = time.perf_counter() - start
        row["factorised"] = sum(choice.method != "dense" for choice in plan.layers.values())
        return row | {"spearman": self.judge(small)}

    def recalibrated(self, small: nn.Module, texts: str, row: Row) -> nn.Module:
        """Fit the layers to what they get; the row keeps the errors of the outputs before and afterwards."""

        def watch(done: Any) -> None:
            row.update(before=done.error_before, after=done.error_after)

        refitting = Refitting(per_pass=PER_PASS, damping=DAMPING)
        options: dict[str, Any] = {"mask": "attention_mask", "stats": self.stats(texts), "refitting": refitting}
        return rf.recalibrate(small, self.model, self.texts(texts).batches, watch=watch, **options)

    def budget(self, ratio: float) -> rf.Budget:
        """Return the budget of the whole model at which its linear layers keep a share of their parameters."""
        whole, linear = sum(p.numel() for p in self.model.parameters()), linear_params(self.model)
        return rf.Budget(params=(whole - (1 - ratio) * linear) / whole)


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Measure every row that is missing."""
    experiment = Experiment()
    if "dense" not in rows:
        keep("dense", experiment.dense())
    rest = [name for name in RULES if name not in FIRST]
    for names, texts, ratio in product((FIRST, rest), ("STS-B", "Shakespeare"), RATIOS):
        for name in names:
            used = "" if RULES[name].metric == "weights" else texts
            key = f"{name}; {used}; {ratio}"
            if key not in rows:
                keep(key, experiment.run(name, used, ratio))


QUICK = {"RATIOS": (0.7,), "TEXTS": 60}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
