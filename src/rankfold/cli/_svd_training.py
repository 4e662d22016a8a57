"""SVD training from the command line: train in SVD form under a live view, prune, tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from torch import Tensor, nn

from rankfold.cli._options import TrainWords
from rankfold.cli._sources import called, example_of, fitting_input
from rankfold.planning import Plan
from rankfold.ranks import energy
from rankfold.train import Epoch, History, Recipe, SVDTraining, TrainingMethod, fit, svd_form

KEEP = 0.99  # the share of the squared values whose rank is shown
ROWS, BAR = 12, 24


class RankView:
    """Loss terms, metric and ranks of a training run, drawn on a terminal while it runs."""

    def __init__(self, run: TrainingMethod, epochs: int) -> None:
        self.run, self.epochs = run, epochs
        self.rows: list[Epoch] = []
        self.spectra: list[Mapping[str, Tensor]] = [run.spectrum()]
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> RankView:
        """Begin to draw, where there is a terminal."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture on the screen."""
        if self._live is not None:
            self._live.stop()

    def watch(self, row: Epoch) -> None:
        """Take in an epoch."""
        self.rows.append(row)
        self.spectra.append(self.run.spectrum())
        if self._live is not None:
            self._live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        """Return the last epochs above the rank of every layer."""
        return Group(self._epochs(), self._ranks())

    def _epochs(self) -> Table:
        heads = ("loss", "task", "penalty", "metric", "ranks", "seconds")
        table = Table("epoch", title=f"SVD training, {len(self.rows)} of {self.epochs} epochs", title_justify="left")
        for head in heads:
            table.add_column(head, justify="right")
        totals = [sum(energy(values, KEEP) for values in spectrum.values()) for spectrum in self.spectra[1:]]
        for row, total in list(zip(self.rows, totals, strict=True))[-ROWS:]:
            numbers = [row.loss, row.task, row.penalty, row.metric]
            cells = ["" if number is None else f"{number:.4g}" for number in numbers]
            table.add_row(str(row.epoch), *cells, str(total), f"{row.seconds:.1f}")
        return table

    def _ranks(self) -> Table:
        table = Table("layer", "", title=f"Ranks that hold {KEEP:.0%} of the energy", title_justify="left")
        table.add_column("rank", justify="right")
        for name, values in self.spectra[-1].items():
            rank = energy(values, KEEP)
            filled = math.ceil(BAR * rank / len(values))
            table.add_row(name, "█" * filled + "░" * (BAR - filled), f"{rank} of {len(values)}")
        return table


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a run: the pruned model and its plan, both histories, the spectra from before the first epoch on."""

    small: nn.Module
    plan: Plan
    trained: History
    tuned: History | None
    spectra: list[Mapping[str, Tensor]]


def train_svd(dense: nn.Module, o: TrainWords, evaluate: Callable[[nn.Module], float] | None) -> Outcome:
    """Train a dense model in SVD form, prune it and tune what is left."""
    pruning = o.pruning(None if o.example is None else example_of(o.example, "float32"))
    form, _ = svd_form(dense, o.svd or "spatial")
    run = SVDTraining(form, kind=o.kind, sparsity=o.sparsity, orthogonality=o.orthogonality)
    taught: dict[str, Any] = {"teacher": dense if o.teacher else None, "lr": o.lr, "evaluate": evaluate}
    with fitting_input(), RankView(run, o.epochs) as view:
        recipe = Recipe(method=run, watch=view.watch, decay=0.0, seed=o.seed, checkpoint=o.checkpoint, progress=False)
        trained = fit(form, called(o.data), epochs=o.epochs, recipe=recipe, **taught)
    small, plan = run.prune(**pruning)
    if not o.tune:
        return Outcome(small, plan, trained, None, view.spectra)
    path = None if o.checkpoint is None else o.checkpoint.with_name(f"{o.checkpoint.stem}.tuning{o.checkpoint.suffix}")
    with fitting_input():
        recipe = Recipe(seed=o.seed, checkpoint=path, keep_best=evaluate is not None)
        tuned = fit(small, called(o.data), epochs=o.tune, recipe=recipe, **taught)
    return Outcome(small, plan, trained, tuned, view.spectra)
