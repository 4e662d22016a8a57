"""The commands: each reads its words, calls one function of the library and shows what came back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from rankfold._common import atomic_path
from rankfold.cli._given import input_of, note, note_random, one_example, pair
from rankfold.cli._options import (
    BEFORE,
    SVD_ALONE,
    CompressWords,
    DemoWords,
    ExportWords,
    MeasureWords,
    PlanWords,
    ReportWords,
    TrainWords,
)
from rankfold.cli._sources import SourceError, apart, called, example_of, fitting_input, fresh, function_of, model_of
from rankfold.cli._svd_training import Outcome, train_svd
from rankfold.demo import demo as run_demo
from rankfold.exporters import export as export_model
from rankfold.pipeline import compress as compress_model
from rankfold.pipeline import plan as make_plan
from rankfold.planning import Plan
from rankfold.plots import plot_report, plot_spectra
from rankfold.reports import report as make_report
from rankfold.stats import measure as measure_model
from rankfold.store import save
from rankfold.train import Recipe, fit


def measure(o: MeasureWords) -> None:
    """Count parameters and multiply-adds of a model and of each of its layers."""
    given = input_of(o.example, o.dtype, o.data)
    source = model_of(o.model, o.weights, o.device)
    with fitting_input():
        stats = measure_model(source, **given)
    if o.as_json:
        typer.echo(stats.to_json())
        return
    typer.echo(str(stats))


def plan(o: PlanWords) -> None:
    """Choose a method and a rank for every layer within a budget; nothing is changed.

    For --latency the layers are timed, and a model of the plan, with random weights, next to the dense one.
    """
    fresh(o.out, o.force)
    budget = o.budget()
    given = input_of(o.example, o.dtype, o.data)
    source = model_of(o.model, o.weights, o.device)  # its module may register methods
    if o.init != "random":
        note_random(o.model, o.weights)
    with fitting_input():
        found = make_plan(source, **given, budget=budget, planning=o.planning())
    if o.out is not None:
        with atomic_path(o.out) as unfinished:
            unfinished.write_text(found.to_json(), encoding="utf-8")
        note(f"wrote {o.out}")
    typer.echo(found.to_json() if o.as_json else str(found))


def compress(o: CompressWords) -> None:
    """Make a model smaller, by a budget or by a plan, and save it together with its plan."""
    fresh(o.out, o.force)
    fresh(o.report, o.force)
    apart(o.out, o.report)
    if o.plan is None:
        budget = o.budget()
    else:
        o.refuse(BEFORE, "--plan already says what becomes of every layer: leave {} out")
        text = o.plan.read_text(encoding="utf-8")
    needs_input = o.plan is None or o.report is not None or (o.example, o.data) != (None, None)
    given = input_of(o.example, o.dtype, o.data, batches=o.batches) if needs_input else {}
    source = model_of(o.model, o.weights, o.device)  # its module may register methods
    note_random(o.model, o.weights)
    if o.plan is None:
        how: dict[str, Any] = {"budget": budget, "planning": o.planning()}
    else:
        ready = Plan.from_json(text)
        how = {"plan": ready, "planning": o.after(ready.planning)}
    with fitting_input():
        small, chosen = compress_model(source, **given, **how)
    save(small, chosen, o.out)
    note(f"saved {o.out}")
    if o.report is not None:
        make_report(source, small, chosen, example=one_example(given)).save(o.report)
        note(f"wrote {o.report}")
    typer.echo(chosen.to_json() if o.as_json else str(chosen))


def train(o: TrainWords) -> None:
    """Train a compressed model further, or with --svd the dense one towards low rank and prune it.

    By default the dense model is the teacher.
    """
    fresh(o.out, o.force)
    evaluate = None if o.evaluate is None else function_of(o.evaluate)
    if o.svd is not None:
        fresh(o.plot, o.force)
        apart(o.out, o.plot)
        if o.small is not None:
            raise SourceError("--svd trains the dense model: leave SMALL out")
        source = model_of(o.model, o.weights, o.device)
        note_random(o.model, o.weights)
        _show_svd(train_svd(source, o, evaluate), o)
        return
    o.refuse(SVD_ALONE, "{} is for training in SVD form: add --svd spatial, or leave it out")
    if o.small is None:
        raise SourceError("name a compressed model to train further, or train the dense one with --svd spatial")
    dense, compressed, chosen = pair(o.model, o.weights, o.small, o.device)
    if o.teacher:
        note_random(o.model, o.weights)
    with fitting_input():
        history = fit(
            compressed,
            called(o.data),
            teacher=dense if o.teacher else None,
            epochs=o.epochs,
            lr=o.lr,
            evaluate=evaluate,
            recipe=Recipe(seed=o.seed, checkpoint=o.checkpoint, keep_best=evaluate is not None),
        )
    save(compressed, chosen, o.out)
    if o.as_json:
        typer.echo(json.dumps(asdict(history)))
    else:
        typer.echo(str(history))
    note(f"saved {o.out}")


def _show_svd(outcome: Outcome, o: TrainWords) -> None:
    """Save and show what came of SVD training."""
    save(outcome.small, outcome.plan, o.out)
    if o.plot is not None:
        plot_spectra(outcome.spectra, o.plot)
        note(f"wrote {o.plot}")
    if o.as_json:
        histories = {"trained": outcome.trained, "tuned": outcome.tuned}
        shown = {name: None if history is None else asdict(history) for name, history in histories.items()}
        typer.echo(json.dumps({**shown, "plan": json.loads(outcome.plan.to_json())}))
    else:
        for history in (outcome.trained, outcome.tuned):
            if history is not None:
                typer.echo(str(history))
        typer.echo(str(outcome.plan))
    note(f"saved {o.out}")


def report(o: ReportWords) -> None:
    """Compare a compressed model with the dense one: sizes, work, time, accuracy, errors."""
    fresh(o.out, o.force)
    fresh(o.plot, o.force)
    apart(o.out, o.plot)
    given = input_of(o.example, o.dtype, o.data)
    dense, compressed, chosen = pair(o.model, o.weights, o.small, o.device)
    note_random(o.model, o.weights)
    with fitting_input():
        found = make_report(
            dense,
            compressed,
            chosen,
            example=one_example(given),
            evaluate=None if o.evaluate is None else function_of(o.evaluate),
            runtime=o.runtime,
            threads=o.threads,
        )
    for path, write in ((o.out, found.save), (o.plot, lambda target: plot_report(found, target))):
        if path is not None:
            write(path)
            note(f"wrote {path}")
    typer.echo(found.to_json() if o.as_json else found.to_text())


def export(o: ExportWords) -> None:
    """Write a compressed model as a program that runs without Rankfold, and check it."""
    fresh(o.out, o.force)
    _, compressed, _ = pair(o.model, None, o.small, "cpu")
    with fitting_input():
        done = export_model(compressed, o.out, example=example_of(o.example, o.dtype), tolerance=o.tolerance)
    if o.as_json:
        typer.echo(json.dumps({**asdict(done), "path": str(done.path)}))
    else:
        typer.echo(f"{done.path}: {done.bytes / 1e6:.3g} MB, differs from the model by {done.difference:.2g}")


def demo(o: DemoWords) -> None:
    """Train a small network on handwritten digits, compress it with every method, compare (offline)."""
    run_demo(o.out, seed=o.seed)
