"""The MLP blocks of all-MiniLM-L6-v2 as flexible layers, beside data-aware SVD of as many parameters, on STS-B.

    python -m reproduce.flexible_activations.sentences.run            # what results.json lacks, table.md and plot.png
    python -m reproduce.flexible_activations.sentences.run --redraw   # table.md and plot.png from results.json

Rows are written as they are done: what was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.flexible_activations.baselines import affine, regression, truncated
from reproduce.flexible_activations.sentences import drawing
from reproduce.flexible_activations.sentences.drawing import METHODS
from reproduce.harness import Row
from reproduce.planning.minilm.model import Judge, Texts, pretrained
from reproduce.training import outputs, params

BLOCKS, RANKS = (2, 5), (32, 16)
ALL = "all"  # six blocks at once
CALIBRATION = 500  # of the 1,500 pairs; the others judge
SAMPLES, ROWS, HELD = 512, 10_000, 2_000  # tokens for the Jacobians, for all that is fitted, for the error
PASSES = 30


class Experiment:
    """The encoder, its texts, and the inputs of one MLP block on the calibration texts."""

    def __init__(self) -> None:
        pairs = datasets.stsb_dev()
        self.model = pretrained()
        texts = Texts.of([text for pair in pairs[:CALIBRATION] for text in (pair.first, pair.second)])
        order = torch.randperm(len(texts.batches), generator=torch.Generator().manual_seed(0))
        self.batches = [texts.batches[k][0] for k in order.tolist()]
        self.judge = Judge(pairs[CALIBRATION:])

    def take(self, number: int) -> None:
        """Turn to another block: its layers, its inputs on tokens that are no padding, its values there."""
        self.number = number
        layer = self.model.bert.encoder.layer[number]
        self.block = nn.Sequential(layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense)
        found: list[Tensor] = []
        hook = layer.intermediate.dense.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
        with torch.no_grad():
            for inputs in self.batches:
                self.model(**inputs)
        hook.remove()
        masks = [inputs["attention_mask"].bool() for inputs in self.batches]
        rows = torch.cat([part[mask] for part, mask in zip(found, masks, strict=True)])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        self.held, self.rows = rows[:HELD], rows[HELD : HELD + ROWS]
        self.values = outputs(self.block, self.rows)

    def error(self, block: nn.Module) -> float:
        """Return the relative error of the block's values on held-out tokens, from their mean."""
        wanted, got = outputs(self.block, self.held), outputs(block, self.held)
        return float((got - wanted).norm() / (wanted - wanted.mean(0)).norm())

    def spearman(self, blocks: Mapping[int, nn.Module]) -> float:
        """Return the score of the encoder with other blocks in the places of these."""
        changed = copy.deepcopy(self.model)
        for number, block in blocks.items():
            layer = changed.bert.encoder.layer[number]
            layer.intermediate.dense, layer.output.dense = block, nn.Identity()
            layer.intermediate.intermediate_act_fn = nn.Identity()
        return self.judge(changed)

    def flexible(self, rank: int) -> nn.Module:
        """Return the flexible layer that `decouple` finds on the rows."""
        data = [(part,) for part in self.rows.split(500)]
        return rf.train.decouple(self.block, "0:2", data, rank=rank, samples=SAMPLES, rows=ROWS)[0]

    def plain(self, rank: int) -> nn.Module:
        """Return both layers of the block truncated by SVD of their weights to this rank."""
        return self.both(rank, torch.eye(384), torch.eye(1536))

    def aware(self, rank: int) -> nn.Module:
        """Return both layers of the block truncated by data-aware SVD to this rank."""
        return self.both(rank, self.rows, outputs(self.block[:2], self.rows))

    def both(self, rank: int, first: Tensor, second: Tensor) -> nn.Module:
        """Return both layers truncated to this rank where their inputs are these."""
        start, act, end = self.block
        return nn.Sequential(*truncated(start, rank, first), act, *truncated(end, rank, second))

    def narrow(self, width: int) -> nn.Module:
        """Return a block of fewer neurons fitted to the values from scratch."""
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Linear(384, width), self.block[1], nn.Linear(width, 384))
        return regression(fresh, self.rows, self.values, seed=0, passes=PASSES)

    def methods(self, rank: int) -> dict[str, Callable[[], nn.Module]]:
        """Return how each method makes its block, of as many parameters as a flexible layer of this rank."""
        kept = rf.layers.FlexibleLinear.cost(384, 384, 0, rank=rank, element="gelu").params
        low = (kept - 1536 - 384) // (2 * (384 + 1536))
        return {
            "flexible": lambda: self.flexible(rank),
            "svd": lambda: self.plain(low),
            "aware": lambda: self.aware(low),
            "affine": lambda: affine(self.rows, self.values, (kept - 384) // 768),
            "narrow": lambda: self.narrow((kept - 384) // 769),
        }


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    run = Experiment()
    if "dense" not in rows:
        keep("dense", {"method": "dense", "spearman": run.judge(run.model)})
    for rank in RANKS:
        made: dict[str, dict[int, nn.Module]] = {method: {} for method in METHODS}
        for number in range(len(run.model.bert.encoder.layer)):
            run.take(number)
            for method, make in run.methods(rank).items():
                key = f"{number} {rank} {method}"
                if f"{ALL} {rank} {method}" in rows:
                    continue
                start = time.process_time()
                block = made[method][number] = make()
                row: Row = {"block": number, "rank": rank, "method": method, "params": params(block)}
                row |= {"seconds": round(time.process_time() - start, 1), "error": round(run.error(block), 4)}
                if key not in rows:
                    score = {"spearman": run.spearman({number: block})} if number in BLOCKS else {}
                    keep(key, row | score)
        for method, blocks in made.items():
            if blocks:
                row = {"block": ALL, "rank": rank, "method": method, "params": sum(map(params, blocks.values()))}
                few = [rows[f"{number} {rank} {method}"] for number in blocks]
                row |= {name: round(sum(one[name] for one in few), 4) for name in ("seconds", "error")}
                row["error"] = round(row["error"] / len(few), 4)  # the mean
                keep(f"{ALL} {rank} {method}", row | {"spearman": run.spearman(blocks)})


QUICK = {
    **{"BLOCKS": (2,), "RANKS": (16,), "CALIBRATION": 50},
    **{"SAMPLES": 512, "ROWS": 300, "HELD": 100, "PASSES": 1},
}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
