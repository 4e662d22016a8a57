"""How the reproductions train: batches in a seeded order, `rf.train.fit` with a score after each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from reproduce.harness import Row

Change = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Images and labels in another order in each epoch, the same orders for the same seed.

    The last batch may be smaller. With `count` an epoch is that many images, drawn anew for each. `change` augments
    a batch of images, with the generator of the order.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        size: int,
        count: int | None = None,
        change: Change | None = None,
    ) -> None:
        self.images, self.labels, self.size, self.change = images, labels, size, change
        self.count = len(images) if count is None else count
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return math.ceil(self.count / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the next epoch."""
        for chosen in torch.randperm(len(self.images), generator=self.generator)[: self.count].split(self.size):
            images = self.images[chosen]
            yield (images if self.change is None else self.change(images, self.generator)), self.labels[chosen]


def fitted(
    model: nn.Module,
    batches: Batches,
    score: Callable[[nn.Module], Row],
    *,
    epochs: int,
    lr: float,
    recipe: rf.train.Recipe,
) -> list[Row]:
    """Train in place; return training loss, score and seconds of each epoch."""
    scores: list[Row] = []

    def evaluate(model: nn.Module) -> float:
        scores.append(score(model))
        return scores[-1]["accuracy"]

    history = rf.train.fit(model, batches, epochs=epochs, lr=lr, evaluate=evaluate, recipe=recipe)
    return [
        {"train_loss": epoch.loss, **row, "seconds": epoch.seconds}
        for epoch, row in zip(history.epochs, scores, strict=True)
    ]


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, *, size: int = 500) -> Tensor:
    """Return the outputs for images, taken `size` at a time in eval mode."""
    return torch.cat([model.eval()(batch) for batch in images.split(size)])


def scored(model: nn.Module, images: Tensor, labels: Tensor, *, size: int = 500) -> Row:
    """Return mean cross-entropy and accuracy (per cent) on images."""
    logits = outputs(model, images, size=size)
    right = (logits.argmax(dim=1) == labels).double()
    return {"test_loss": F.cross_entropy(logits, labels).item(), "accuracy": 100 * right.mean().item()}


def correct(model: nn.Module, images: Tensor, labels: Tensor, *, size: int = 500) -> Tensor:
    """Return which images the model classifies rightly."""
    return outputs(model, images, size=size).argmax(dim=1) == labels


def plain(
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    schedule: str = "constant",
    checkpoint: Path | None = None,
    **options: object,
) -> rf.train.Recipe:
    """Return a recipe of an optimiser with its options and a schedule: no warm-up, decay, clipping."""
    return rf.train.Recipe(
        optimizer=lambda groups, lr: optimizer(groups, lr=lr, **options),
        schedule=schedule,
        warmup=0.0,
        decay=0.0,
        clip=math.inf,
        batchnorm=0,
        checkpoint=checkpoint,
    )


def params(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the mean difference of two outcomes on the same images and its standard error, in per cent."""
    difference = 100 * (a.double() - b.double())
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def packed(right: Tensor) -> str:
    """Return truth values as hexadecimal digits, four a digit, the first image first."""
    return "".join(f"{int(''.join(map(str, four.int().tolist())), 2):x}" for four in right.split(4))


def unpacked(digits: str) -> Tensor:
    """Return the truth values of `packed`, as many as four a digit."""
    return torch.tensor([bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"])
