"""SVD training from the command line: train in SVD form under a live view, prune, tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from torch import Tensor, nn

from rankfold.cli._sources import SourceError, fitting_input
from rankfold.planning import Budget, Plan
from rankfold.ranks import energy
from rankfold.train import Epoch, History, Recipe, SVDTraining, TrainingMethod, fit, svd_form

KEEP = 0.99  # the share of the squared values whose rank is shown
ROWS, BAR = 12, 24


@dataclass(frozen=True)
class Words:
    """What `rankfold train --svd` says beside what `rankfold train` says."""

    split: str
    kind: str
    sparsity: float
    orthogonality: float
    params: float | None
    macs: float | None
    energy: float | None
    tune: int

    def pruning(self, example: Any) -> dict[str, Any]:
        """Return the arguments of `prune`."""
        budgeted = self.params is not None or self.macs is not None
        if budgeted == (self.energy is not None):
            raise SourceError("say how far to prune: --macs 0.5, --params 0.5 or --energy 0.999")
        if self.macs is not None and example is None:
            raise SourceError("--macs needs --example 1,3,224,224: MACs depend on the input")
        limit = {"energy": self.energy} if not budgeted else {"budget": Budget(params=self.params, macs=self.macs)}
        return {**limit, "example": example}


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


def train_svd(  # noqa: PLR0913
    dense: nn.Module,
    load: Callable[[], Any],
    words: Words,
    *,
    example: Any,
    teacher: bool,
    epochs: int,
    lr: float,
    evaluate: Callable[[nn.Module], float] | None,
    checkpoint: Path | None,
    seed: int,
) -> Outcome:
    """Train a dense model in SVD form, prune it and tune what is left."""
    pruning = words.pruning(example)
    form, _ = svd_form(dense, words.split)
    run = SVDTraining(form, kind=words.kind, sparsity=words.sparsity, orthogonality=words.orthogonality)
    taught: dict[str, Any] = {"teacher": dense if teacher else None, "lr": lr, "evaluate": evaluate}
    with fitting_input(), RankView(run, epochs) as view:
        recipe = Recipe(method=run, watch=view.watch, decay=0.0, seed=seed, checkpoint=checkpoint, progress=False)
        trained = fit(form, load(), epochs=epochs, recipe=recipe, **taught)
    small, plan = run.prune(**pruning)
    if not words.tune:
        return Outcome(small, plan, trained, None, view.spectra)
    path = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.stem}.tuning{checkpoint.suffix}")
    with fitting_input():
        recipe = Recipe(seed=seed, checkpoint=path, keep_best=evaluate is not None)
        tuned = fit(small, load(), epochs=words.tune, recipe=recipe, **taught)
    return Outcome(small, plan, trained, tuned, view.spectra)
