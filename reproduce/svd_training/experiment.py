"""Networks, data and the one loop of training: a low-rank method for some epochs, a cut, the rest of the epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets
from reproduce.cifar_resnet import model as resnet
from reproduce.cifar_resnet.run import Batches as CifarBatches
from reproduce.cp_mnist import model as mnist
from reproduce.harness import Row
from reproduce.training import Batches, correct, packed

BATCH = 128
HELD_OUT = 5_000  # training images of CIFAR-10 that a network from scratch does not see
CALIBRATION = 2_000  # images that BatchNorm is re-estimated on after a cut


@dataclass(frozen=True, eq=False)
class Task:
    """A network, its data, and what it is trained with.

    `start` makes the network that training begins with; `tests` are images and labels it has not seen, by name;
    `batches` makes one pass after the other over the training images for a seed.
    """

    start: Callable[[int], nn.Module]
    tests: dict[str, tuple[Tensor, Tensor]]
    batches: Callable[[int], Any]
    calibration: Callable[[], Any] | None
    example: Tensor
    lr: float = 1e-3
    autocast: bool = False

    def score(self, model: nn.Module) -> Row:
        """Return the accuracy in per cent on every test, and which images of the first were right."""
        right = {name: correct(model, *test) for name, test in self.tests.items()}
        first = next(iter(right.values()))
        return {**{name: 100 * r.double().mean().item() for name, r in right.items()}, "right": packed(first)}

    def quick(self) -> Task:
        """Return the task on one batch of training images, to see that everything runs."""
        few = {name: (images[:64], labels[:64]) for name, (images, labels) in self.tests.items()}
        return replace(self, tests=few, batches=lambda seed: _Few(self.batches(seed)), calibration=None)


class _Few:
    """The first two batches of every pass."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k, batch in enumerate(self.batches):
            if k == 2:
                return
            yield batch


def resnet20(*, pretrained: bool) -> Task:
    """Return ResNet-20 on CIFAR-10, from the weights of others or from scratch, with 5,000 images then held out."""
    data = datasets.cifar10()
    seen = len(data.train_images) - (0 if pretrained else HELD_OUT)
    tests = {"test": (resnet.normalised(data.test_images), data.test_labels)}
    if not pretrained:
        tests["held out"] = (resnet.normalised(data.train_images[seen:]), data.train_labels[seen:])
    images, labels = data.train_images[:seen], data.train_labels[:seen]

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return resnet.pretrained(datasets.resnet20_weights()) if pretrained else resnet.ResNet20()

    return Task(
        start=start,
        tests=tests,
        batches=lambda seed: CifarBatches(images, labels, seed=seed, size=BATCH),
        calibration=lambda: CifarBatches(images[:CALIBRATION], labels[:CALIBRATION], seed=0, size=200),
        example=tests["test"][0][:1],
        lr=1e-3 if pretrained else 2e-3,
        autocast=True,
    )


def mnist_network() -> Task:
    """Return the small convolutional network of the MNIST table, from scratch."""
    data = datasets.mnist()
    return _images(data, mnist.normalised, lambda: mnist.network(None), autocast=True)


def fashion_mlp() -> Task:
    """Return a perceptron 784-500-500-10 on Fashion-MNIST, from scratch."""

    def network() -> nn.Module:
        layers = (nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10))
        return nn.Sequential(nn.Flatten(), *layers)

    return _images(datasets.fashion_mnist(), lambda images: (images.float() / 255 - 0.286) / 0.353, network)


def _images(
    data: datasets.Images,
    change: Callable[[Tensor], Tensor],
    network: Callable[[], nn.Module],
    *,
    autocast: bool = False,
) -> Task:
    images, tests = change(data.train_images), {"test": (change(data.test_images), data.test_labels)}

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return network()

    return Task(
        start=start,
        tests=tests,
        batches=lambda seed: Batches(images, data.train_labels, seed=seed, size=BATCH),
        calibration=None,
        example=tests["test"][0][:1],
        autocast=autocast,
    )


@contextmanager
def _kept(path: Path | None) -> Iterator[dict[str, Any]]:
    """Give the state of a run that was stopped, empty where there is none."""
    yield {} if path is None or not path.exists() else torch.load(path, weights_only=True)


def train(
    task: Task,
    model: nn.Module,
    run: rf.train.TrainingMethod | None,
    *,
    epochs: int,
    seed: int,
    checkpoint: Path | None = None,
) -> list[Row]:
    """Train in place with Adam and a cosine; return the means of loss and penalty, and seconds, of every epoch.

    With a checkpoint the state is written after each epoch and taken up again.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr, fused=True)
    batches, log = task.batches(seed), []
    with _kept(checkpoint) as kept:
        if kept:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            log = kept["log"]
            if run is not None:
                run.load_state_dict(kept["method"])
    for epoch in range(epochs):
        if epoch < len(log):
            for _ in batches:  # so that the order of what follows is that of an unbroken run
                pass
            continue
        log.append(_epoch(task, model, run, optimizer, batches, done=(epoch, epochs)))
        if run is not None:
            run.epoch()
        if checkpoint is not None:
            method = {} if run is None else run.state_dict()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log, "method": method}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
        if run is not None and run.finished:
            break
    return log


def _epoch(
    task: Task,
    model: nn.Module,
    run: rf.train.TrainingMethod | None,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    *,
    done: tuple[int, int],
) -> Row:
    model.train()
    began, losses, penalties = time.perf_counter(), [], []
    for k, (images, labels) in enumerate(batches):
        share = (done[0] + k / len(batches)) / done[1]
        for group in optimizer.param_groups:
            group["lr"] = task.lr * 0.5 * (1 + math.cos(math.pi * share))
        if task.autocast and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # the faster order of bfloat16 on processors
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.autocast):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        total = loss if run is None else run.total(loss)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if run is not None:
            run.step()
        losses.append(loss.item())
        penalties.append(total.item() - loss.item())
    mean = sum(losses) / len(losses)
    return {
        "loss": mean,
        "penalty": sum(penalties) / len(penalties),
        "seconds": time.perf_counter() - began,
    }


def tuned(task: Task, small: nn.Module, *, epochs: int, seed: int) -> Row:
    """Return the scores of a model just cut: as it is, with BatchNorm re-estimated, and after training in place."""
    row = {"cut": task.score(small)}
    if task.calibration is not None:
        rf.train.reestimate_batchnorm(small, task.calibration())
        row["batchnorm"] = task.score(small)
    log = train(task, small, None, epochs=epochs, seed=seed + 1)
    return {**row, "tuned": task.score(small), "seconds": sum(epoch["seconds"] for epoch in log)}
