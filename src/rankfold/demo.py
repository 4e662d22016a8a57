"""The whole job on real data, offline: handwritten digits, a small network, every method, two budgets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rankfold._common import evaluating, track
from rankfold.errors import RankfoldError, StoreError
from rankfold.latency import Latency, time_models, using_threads
from rankfold.pipeline import compress
from rankfold.planning import Budget, Plan, Planning
from rankfold.plots import plot_report
from rankfold.reports import report
from rankfold.stats import measure
from rankfold.store import load, save
from rankfold.train import Recipe, fit, reestimate_batchnorm

METHODS: Mapping[str, tuple[str, ...]] = {
    "svd": ("svd",),
    "cp": ("cp",),
    "tucker": ("tucker",),
    "tt": ("tt",),
    "free mix": ("svd", "cp", "tucker", "tt"),
}
BUDGETS = (0.5, 0.25)
TRAINED_ON, TESTED_ON = 1297, 500
BATCH = 64
HEADS = ("method", "params", "MACs", "one\nshot", "batch\nnorm", "tuned", "ms", "speed-up")
LEGEND = (
    "One shot: right after compression. Batch norm: statistics re-estimated. Tuned: trained with the "
    f"dense network as the teacher. Milliseconds for {BATCH} images; speed-up over dense with quartiles, one thread, "
    "timed side by side."
)


@dataclass(frozen=True)
class Result:
    """One row of the demo's table.

    Attributes:
        name: "dense", a method, or "free mix".
        budget: Parameters that the plan could keep, as a fraction.
        params: Parameters.
        macs: Multiply-adds per image.
        one_shot: Test accuracy right after compression.
        estimated: Test accuracy after BatchNorm re-estimation.
        recovered: Test accuracy after a short training with the dense teacher.
        latency: Time per batch, measured side by side with all other rows.
    """

    name: str
    budget: float | None
    params: int
    macs: int
    one_shot: float | None
    estimated: float | None
    recovered: float
    latency: Latency


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) between 0 and 1 and their classes."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor

    def loader(self, seed: int) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training batches, in an order that depends on the seed alone."""
        data = TensorDataset(self.train_images, self.train_classes)
        return DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test images that a model classifies correctly."""
        with evaluating(model), torch.no_grad():
            return float((model(self.test_images).argmax(1) == self.test_classes).double().mean())


def digits() -> Digits:
    """Return the 8x8 handwritten digits that scikit-learn carries, split the same way every time."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as problem:
        raise RankfoldError(f"the demo needs scikit-learn: pip install 'rankfold[demo]' ({problem})") from problem
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(images).float() / 16).reshape(-1, 1, 8, 8)[order]
    y = torch.from_numpy(classes).long()[order]
    return Digits(x[:TRAINED_ON], y[:TRAINED_ON], x[TRAINED_ON:], y[TRAINED_ON:])


def network() -> nn.Module:
    """Return a convolutional network for 8x8 images, with fresh random weights."""
    layers: dict[str, nn.Module] = {
        **_block(1, 1, 32),
        **_block(2, 32, 64),
        "pool": nn.MaxPool2d(2),
        **_block(3, 64, 128),
        **_block(4, 128, 128),
        "mean": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "hidden": nn.Linear(128, 64),
        "relu": nn.ReLU(),
        "classes": nn.Linear(64, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def _block(number: int, inside: int, outside: int) -> dict[str, nn.Module]:
    return {
        f"conv{number}": nn.Conv2d(inside, outside, 3, padding=1, bias=False),
        f"norm{number}": nn.BatchNorm2d(outside),
        f"relu{number}": nn.ReLU(),
    }


def demo(out: str | Path, *, seed: int = 0, epochs: int = 6, recovery: int = 3) -> tuple[Result, ...]:
    """Train, compress with every method at two budgets, recover, compare; print one table.

    Writes the best compressed model, its report and, with matplotlib, a picture.

    Args:
        out: Directory for the files; made where it does not exist. Files of an earlier demo are replaced.
        seed: Seed of everything random; the same seed gives the same numbers, times apart.
        epochs: Passes over the training images for the dense network.
        recovery: Passes for each compressed one.

    Returns:
        The rows of the table, dense first.

    Raises:
        RankfoldError: Where scikit-learn is missing.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console, data = Console(), digits()
    jobs = [(name, budget) for budget in BUDGETS for name in METHODS]
    with using_threads(1):  # sums in the same order, so the same numbers, on any number of cores
        console.print(f"Training a network on {TRAINED_ON:,} handwritten digits …")
        dense = _trained(data, seed=seed, epochs=epochs)
        console.print(f"Compressing it in {len(jobs)} ways and recovering each for {recovery} epochs …")
        tried = [_tried(dense, data, name, budget, seed, recovery) for name, budget in track(jobs, "Compressing")]
        models = {"dense": dense} | {f"{one.name} {one.budget}": one.model for one in tried}
        times = time_models(models, data.test_images[:BATCH])
    results = _results(dense, data, tried, times)
    console.print(_table(results))
    console.print(LEGEND)
    # Of the smallest models the most accurate one; the first of equals.
    best = max((one for one in tried if one.budget == min(BUDGETS)), key=lambda one: one.accuracy[-1])
    for line in _write(out, dense, best, data):
        console.print(line, soft_wrap=True)
    return results


@dataclass(frozen=True, eq=False)
class _Tried:
    """One way to compress the network, and the test accuracy after each step."""

    name: str
    budget: float
    model: nn.Module
    plan: Plan
    accuracy: tuple[float, float, float]


_Row: TypeAlias = tuple[str, float | None, nn.Module, tuple[float | None, float | None, float]]


def _trained(data: Digits, *, seed: int, epochs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    fit(model, data.loader(seed), epochs=epochs, lr=3e-3, recipe=Recipe(seed=seed, progress=False))
    return model


def _tried(dense: nn.Module, data: Digits, name: str, budget: float, seed: int, recovery: int) -> _Tried:
    planning = Planning(methods=METHODS[name], seed=seed)
    small, plan = compress(dense, example=data.test_images[:1], budget=Budget(params=budget), planning=planning)
    one_shot = data.accuracy(small)
    reestimate_batchnorm(small, data.loader(seed))
    estimated = data.accuracy(small)
    recipe = Recipe(seed=seed, batchnorm=0, progress=False)
    fit(small, data.loader(seed), teacher=dense, epochs=recovery, lr=1e-3, recipe=recipe)
    return _Tried(name, budget, small, plan, (one_shot, estimated, data.accuracy(small)))


def _results(
    dense: nn.Module, data: Digits, tried: Sequence[_Tried], times: Mapping[str, Latency]
) -> tuple[Result, ...]:
    rows: list[_Row] = [("dense", None, dense, (None, None, data.accuracy(dense)))]
    rows += [(one.name, one.budget, one.model, one.accuracy) for one in tried]
    measured = [measure(model, example=data.test_images[:1]) for _, _, model, _ in rows]
    return tuple(
        Result(name, budget, stats.params, stats.macs, *accuracy, latency=latency)
        for (name, budget, _, accuracy), stats, latency in zip(rows, measured, times.values(), strict=True)
    )


def _table(results: Sequence[Result]) -> Table:
    dense = results[0]
    table = Table(
        *(Column(head, justify="right" if index else "left", no_wrap=True) for index, head in enumerate(HEADS)),
        title=f"Accuracy on {TESTED_ON} handwritten digits, before and after recovery",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for before, row in zip((dense, *results), results, strict=False):
        if row.budget != before.budget:
            table.add_section()
        accuracies = (row.one_shot, row.estimated, row.recovered)
        table.add_row(
            row.name,
            f"{row.params / 1e3:.0f} k {row.params / dense.params:4.0%}",
            f"{row.macs / 1e6:.2f} M {row.macs / dense.macs:4.0%}",
            *("" if value is None else f"{value:.1%}" for value in accuracies),
            f"{1e3 * row.latency.median:.1f}",
            "{:.2f} ({:.2f}-{:.2f})".format(row.latency.ratio, *row.latency.ratio_quartiles),
        )
    return table


def _write(out: Path, dense: nn.Module, best: _Tried, data: Digits) -> Iterator[str]:
    """Save the best model, check what was saved, report on it; yield what to tell the user."""
    saved = out / "digits.safetensors"
    save(best.model, best.plan, saved)
    loaded = load(saved, dense)
    with evaluating(best.model, loaded), torch.no_grad():
        if not torch.equal(best.model(data.test_images), loaded(data.test_images)):
            raise StoreError(f"{saved} does not give the outputs of the model that was saved")
    yield f"model    {saved} ({best.name} at {best.budget:.0%}; reloaded: same outputs)"
    found = report(dense, loaded, best.plan, example=data.test_images[:BATCH], evaluate=data.accuracy, threads=1)
    yield f"report   {found.save(out / 'report.md')}"
    if find_spec("matplotlib") is None:
        yield "picture  none: pip install 'rankfold[plots]'"
    else:
        yield f"picture  {plot_report(found, out / 'report.png')}"
