"""What do the penalties of SVD training cost, beside the step of ResNet-20 on a batch of 128 that they are added to?

    python benchmarks/what_does_the_penalty_cost.py                # one thread
    python benchmarks/what_does_the_penalty_cost.py --threads 2 --rounds 9

A step is forward, cross-entropy, backward and Adam. The cost of the penalty is its forward and its backward alone; the
share is of the step of the network in SVD form without it. The step of the dense network says what the form itself
costs. Penalties computed layer by layer are beside those computed for all layers of one shape at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import compare, few, options, ratio, verdict, write
from torch import Tensor, nn
from torch.nn import functional as F

import rankfold as rf
from rankfold.train import SVDTraining

sys.path.insert(0, str(Path(__file__).parent.parent))
from reproduce.cifar_resnet.model import ResNet20

TARGET = 0.15


def stepper(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def penalty_of(run: SVDTraining) -> Callable[[], None]:
    def penalise() -> None:
        run.penalty().backward()

    return penalise


def layer_by_layer(run: SVDTraining) -> Callable[[], None]:
    """The same formulas as anyone would write them first."""

    def penalise() -> None:
        total = torch.zeros(())
        for layer in run.layers.values():
            left, values, right = (part[0] for part in layer.triplets())
            for factor in (left.T, right):
                gram = factor @ factor.T
                total = total + (gram - torch.eye(len(gram))).square().sum() / len(gram) ** 2
            total = total + run.sparsity * (values.abs().sum() / values.norm() - 1)
        total.backward()

    return penalise


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    rows = []
    for split in few(("spatial", "channel")):
        for dtype in (torch.float32, torch.bfloat16):
            dense = ResNet20()
            form, _ = rf.train.svd_form(dense, split)
            run = SVDTraining(form, kind="hoyer")
            contestants = {
                "dense": stepper(dense, images, labels, dtype),
                "form": stepper(form, images, labels, dtype),
                "penalty": penalty_of(run),
                "layer by layer": layer_by_layer(run),
            }
            times = compare(contestants, rounds=words.rounds)
            share = 1 / ratio(times["form"], times["penalty"])
            rows.append(
                {
                    "split": split,
                    "step in": str(dtype).removeprefix("torch."),
                    "dense step": times["dense"],
                    "step in SVD form": times["form"],
                    "penalty": times["penalty"],
                    "layer by layer": times["layer by layer"],
                    "share of the step": f"{share:.1%}",
                    "target": verdict(share, TARGET, most=True),
                }
            )
    write("what_does_the_penalty_cost", rows, title="What does the penalty of SVD training cost?", batch=128)


if __name__ == "__main__":
    main()
