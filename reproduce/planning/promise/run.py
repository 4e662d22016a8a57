"""ResNet-20 on CIFAR-10 with `max_drop=0.01`: is the promise of a search kept on images that it did not see?

    python -m reproduce.planning.promise.run            # some twenty minutes on one thread
    python -m reproduce.planning.promise.run --quick    # on few images: does it run?

The search goes on where it was stopped: its scores are kept in the cache folder. The result is written to results.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.cifar_resnet.model import normalised, pretrained
from reproduce.cifar_resnet.run import Batches, paired
from reproduce.harness import Row
from reproduce.training import correct

MAX_DROP, EVALUATIONS = 0.01, 12
CALIBRATION, BATCH = 1_000, 100  # the first training images
SEARCHED = slice(1_000, 13_000)  # training images that the search scores models on
UNSEEN = slice(13_000, 25_000)  # training images that it does not see
SEED = 0


def measured() -> Row:
    """Search, then score the model that was found on images that were not searched on."""
    torch.set_num_threads(1)
    data, dense = datasets.cifar10(), pretrained(datasets.resnet20_weights())
    images, labels = data.train_images, data.train_labels
    calibration = list(Batches(images[:CALIBRATION], labels[:CALIBRATION], seed=SEED, size=BATCH))
    searched = normalised(images[SEARCHED]), labels[SEARCHED]

    def evaluate(model: nn.Module) -> Tensor:
        return correct(model, *searched).float()

    folder = datasets.made_in()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = rf.search(
        dense,
        calibration,
        evaluate=evaluate,
        max_drop=MAX_DROP,
        evaluations=EVALUATIONS,
        resume=folder / "promise resnet20.json",
        planning=rf.Planning(seed=SEED),
    )
    seconds = time.perf_counter() - start
    print(found)
    unseen = {
        "searched": searched,
        "unseen": (normalised(images[UNSEEN]), labels[UNSEEN]),
        "test": (normalised(data.test_images), data.test_labels),
    }
    row: Row = {
        "max_drop": MAX_DROP,
        "evaluations": 1 + len(found.steps),
        "macs_kept": found.plan.macs / found.plan.dense.macs,
        "params_kept": found.plan.params / found.plan.dense.params,
        "seconds": seconds,
        "steps": [
            {"share": s.share, "value": s.value, "drop": s.drop, "error": s.error, "kept": s.kept} for s in found.steps
        ],
    }
    for name, (some, truth) in unseen.items():
        before, after = correct(dense, some, truth), correct(found.model, some, truth)
        difference, error = paired(after, before)
        row[name] = {
            "images": len(truth),
            "dense": 100 * before.double().mean().item(),
            "difference": difference,
            "se": error,
        }
        print(f"{name}: {len(truth):,} images, {difference:+.2f} ± {error:.2f} points")
    return row


QUICK = {"CALIBRATION": 100, "SEARCHED": slice(100), "UNSEEN": slice(100, 200), "MAX_DROP": 0.5, "EVALUATIONS": 4}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="on few images; nothing is written")
    if parser.parse_args().quick:
        with harness.shortened(measured, QUICK):
            measured()
    else:
        harness.store({"resnet20": measured()}, Path(__file__).parent / "results.json")
