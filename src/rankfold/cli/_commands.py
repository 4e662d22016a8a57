"""The commands: each reads its words, calls one function of the library and shows what came back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from rankfold._common import atomic_path
from rankfold.cli import _options as o
from rankfold.cli._given import (
    applied,
    compressed,
    input_of,
    one_example,
    planned,
    refuse_search,
    search,
    was_given,
)
from rankfold.cli._sources import RANDOM, SourceError, called, example_of, fitting_input, fresh, function_of, model_of
from rankfold.cli._svd_training import Outcome, Words, train_svd
from rankfold.demo import demo as run_demo
from rankfold.exporters import export as export_model
from rankfold.planning import Plan
from rankfold.plots import plot_report, plot_spectra
from rankfold.reports import report as make_report
from rankfold.stats import measure as measure_model
from rankfold.store import load, read_plan, save
from rankfold.train import History, Recipe, fit


def measure(  # noqa: PLR0913
    model: o.Model,
    weights: o.Weights = None,
    example: o.Example = None,
    dtype: o.Dtype = "float32",
    data: o.Data = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Count parameters and multiply-adds of a model and of each of its layers."""
    given = input_of(example, dtype, data)
    source = model_of(model, weights, device)
    with fitting_input():
        stats = measure_model(source, **given)
    if as_json:
        typer.echo(stats.to_json())
        return
    table = Table("layer", "kind", title=f"{model}, batch of {stats.batch_size}", title_justify="left")
    for head in ("params", "MACs", "calls"):
        table.add_column(head, justify="right")
    for name, layer in stats.layers.items():
        table.add_row(name, layer.kind, f"{layer.params:,}", f"{layer.macs:,}", str(len(layer.calls)))
    table.add_section()
    table.add_row("whole model", "", f"{stats.params:,}", f"{stats.macs:,}", "")
    Console().print(table)
    typer.echo("MACs are per example; parameters of the whole model count shared ones once.")


def plan(  # noqa: PLR0913
    model: o.Model,
    weights: o.Weights = None,
    example: o.Example = None,
    dtype: o.Dtype = "float32",
    data: o.Data = None,
    device: o.Device = "cpu",
    params: o.Params = None,
    macs: o.Macs = None,
    bytes_: o.Bytes = None,
    latency: o.Latency = None,
    methods: o.Methods = "svd,tucker",
    rule: o.Rule = "optimal",
    include: o.Include = None,
    exclude: o.Exclude = None,
    multiple: o.Multiple = 1,
    metric: o.Metric = "auto",
    batches: o.Batches = None,
    init: o.Init = "decompose",
    seed: o.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write the plan here.")] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Choose a method and a rank for every layer within a budget; nothing is changed.

    For --latency the layers are timed, and a model of the plan, with random weights, beside the dense one.
    """
    fresh(out, force)
    options = search(params, macs, bytes_, latency, methods, rule, include, exclude, multiple, metric)
    given = input_of(example, dtype, data)
    source = model_of(model, weights, device)
    if init != "random":
        _note_random(model, weights)
    found = planned(source, given, {**options, "init": init}, batches=batches, seed=seed)
    if out is not None:
        with atomic_path(out) as unfinished:
            unfinished.write_text(found.to_json(), encoding="utf-8")
        _note(f"wrote {out}")
    typer.echo(found.to_json() if as_json else str(found))


def compress(  # noqa: PLR0913
    ctx: typer.Context,
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="The compressed model.")],
    weights: o.Weights = None,
    example: o.Example = None,
    dtype: o.Dtype = "float32",
    data: o.Data = None,
    device: o.Device = "cpu",
    params: o.Params = None,
    macs: o.Macs = None,
    bytes_: o.Bytes = None,
    latency: o.Latency = None,
    methods: o.Methods = "svd,tucker",
    rule: o.Rule = "optimal",
    include: o.Include = None,
    exclude: o.Exclude = None,
    multiple: o.Multiple = 1,
    metric: o.Metric = "auto",
    recalibrate: o.Recalibrate = True,
    batches: o.Batches = None,
    seed: o.Seed = 0,
    plan_file: o.PlanIn = None,
    report_file: o.ReportOut = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Make a model smaller, by a budget or by a plan, and save it together with its plan."""
    fresh(out, force)
    fresh(report_file, force)
    needs_input = plan_file is None or report_file is not None or data is not None
    given = input_of(example, dtype, data, batches=batches) if needs_input else {}
    if plan_file is None:
        options = search(params, macs, bytes_, latency, methods, rule, include, exclude, multiple, metric)
    else:
        refuse_search(ctx)
        ready = Plan.from_json(plan_file.read_text(encoding="utf-8"))
    source = model_of(model, weights, device)
    _note_random(model, weights)
    if plan_file is None:
        small, chosen = compressed(source, given, options, recalibrate=recalibrate, batches=batches, seed=seed)
    else:
        small, chosen = applied(source, ready, given, batches=batches, seed=seed), ready
    save(small, chosen, out)
    _note(f"saved {out}")
    if report_file is not None:
        make_report(source, small, chosen, example=one_example(given)).save(report_file)
        _note(f"wrote {report_file}")
    typer.echo(chosen.to_json() if as_json else str(chosen))


def train(  # noqa: PLR0913
    ctx: typer.Context,
    model: o.Model,
    data: Annotated[
        str, typer.Option("--data", metavar="package.module:function", help="A function that returns a loader.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="The trained compressed model.")],
    small: o.SmallOrNone = None,
    weights: o.Weights = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 1,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Highest learning rate.")] = 1e-3,
    teacher: Annotated[bool, typer.Option("--teacher/--no-teacher", help="Learn from the dense model too.")] = True,
    evaluate: o.Evaluate = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help="Written every epoch; resumed from if there.")
    ] = None,
    svd: o.Split = None,
    kind: o.Kind = "hoyer",
    sparsity: o.Sparsity = 0.1,
    orthogonality: o.Orthogonality = 1.0,
    params: o.Params = None,
    macs: o.Macs = None,
    energy: o.Energy = None,
    tune: o.Tune = 1,
    example: o.Example = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the singular values.")] = None,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Train a compressed model further, or with --svd the dense one towards low rank and prune it.

    By default the dense model is the teacher.
    """
    fresh(out, force)
    if svd is not None:
        fresh(plot, force)
        if small is not None:
            raise SourceError("--svd trains the dense model: leave SMALL out")
        source = model_of(model, weights, device)
        _note_random(model, weights)
        outcome = train_svd(
            source,
            lambda: called(data),
            Words(svd, kind, sparsity, orthogonality, params, macs, energy, tune),
            example=None if example is None else example_of(example, "float32"),
            teacher=teacher,
            epochs=epochs,
            lr=lr,
            evaluate=None if evaluate is None else function_of(evaluate),
            checkpoint=checkpoint,
            seed=seed,
        )
        _show_svd(outcome, out, plot, as_json)
        return
    _refuse_svd(ctx)
    if small is None:
        raise SourceError("name a compressed model to train further, or train the dense one with --svd spatial")
    dense, compressed, chosen = _pair(model, weights, small, device)
    if teacher:
        _note_random(model, weights)
    with fitting_input():
        history = fit(
            compressed,
            called(data),
            teacher=dense if teacher else None,
            epochs=epochs,
            lr=lr,
            evaluate=None if evaluate is None else function_of(evaluate),
            recipe=Recipe(seed=seed, checkpoint=checkpoint, keep_best=evaluate is not None),
        )
    save(compressed, chosen, out)
    if as_json:
        typer.echo(json.dumps(asdict(history)))
    else:
        Console().print(_history_table(history))
    _note(f"saved {out}")


def _show_svd(outcome: Outcome, out: Path, plot: Path | None, as_json: bool) -> None:
    """Save and show what came of SVD training."""
    save(outcome.small, outcome.plan, out)
    if plot is not None:
        plot_spectra(outcome.spectra, plot)
        _note(f"wrote {plot}")
    if as_json:
        histories = {"trained": outcome.trained, "tuned": outcome.tuned}
        shown = {name: None if history is None else asdict(history) for name, history in histories.items()}
        typer.echo(json.dumps({**shown, "plan": json.loads(outcome.plan.to_json())}))
    else:
        for history in (outcome.trained, outcome.tuned):
            if history is not None:
                Console().print(_history_table(history))
        typer.echo(str(outcome.plan))
    _note(f"saved {out}")


def _refuse_svd(ctx: typer.Context) -> None:
    for name in ("kind", "sparsity", "orthogonality", "params", "macs", "energy", "tune", "example", "plot"):
        if was_given(ctx, name):
            raise SourceError(f"--{name} is for training in SVD form: add --svd spatial, or leave it out")


def report(  # noqa: PLR0913
    model: o.Model,
    small: o.Small,
    weights: o.Weights = None,
    example: o.Example = None,
    dtype: o.Dtype = "float32",
    data: o.Data = None,
    evaluate: o.Evaluate = None,
    runtime: o.Runtime = "eager",
    threads: o.Threads = None,
    device: o.Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it: .md, .json or .txt.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it too.")] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Compare a compressed model with the dense one: sizes, work, time, accuracy, errors."""
    fresh(out, force)
    fresh(plot, force)
    given = input_of(example, dtype, data)
    dense, compressed, chosen = _pair(model, weights, small, device)
    _note_random(model, weights)
    with fitting_input():
        found = make_report(
            dense,
            compressed,
            chosen,
            example=one_example(given),
            evaluate=None if evaluate is None else function_of(evaluate),
            runtime=runtime,
            threads=threads,
        )
    for path, write in ((out, found.save), (plot, lambda target: plot_report(found, target))):
        if path is not None:
            write(path)
            _note(f"wrote {path}")
    typer.echo(found.to_json() if as_json else found.to_text())


def export(  # noqa: PLR0913
    model: o.Model,
    small: o.Small,
    example: Annotated[str, typer.Option("--example", metavar="SIZES", help="Shape of one batch: 1,3,224,224.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The program: .onnx or .pt2.")],
    dtype: o.Dtype = "float32",
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Largest difference allowed, relative to the largest output.")
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Write a compressed model as a program that runs without Rankfold, and check it."""
    fresh(out, force)
    _, compressed, _ = _pair(model, None, small, "cpu")
    with fitting_input():
        done = export_model(compressed, out, example=example_of(example, dtype), tolerance=tolerance)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "path": str(done.path)}))
    else:
        typer.echo(f"{done.path}: {done.bytes / 1e6:.3g} MB, differs from the model by {done.difference:.2g}")


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIRECTORY", help="Where the model, the report and the picture go.")
    ] = Path("rankfold-demo"),
    seed: o.Seed = 0,
) -> None:
    """Train a small network on handwritten digits, compress it with every method, compare (offline)."""
    run_demo(out, seed=seed)


def _pair(model: str, weights: Path | None, small: Path, device: str) -> tuple[nn.Module, nn.Module, Plan]:
    """Return the dense model, the compressed one that the file holds, and the plan in the file."""
    if not small.is_file():
        raise FileNotFoundError(f"there is no file {small}")
    dense = model_of(model, weights, device)
    return dense, load(small, model_of(model, None, "cpu")).to(device), read_plan(small)


def _note_random(model: str, weights: Path | None) -> None:
    if weights is None and model.partition(":")[0] in RANDOM:
        _note(f"{model} has random weights: give trained ones with --weights FILE.safetensors")


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _history_table(history: History) -> Table:
    table = Table("epoch", title="Training", title_justify="left")
    for head in ("loss", "metric", "seconds"):
        table.add_column(head, justify="right")
    for row in history.epochs:
        metric = "" if row.metric is None else f"{row.metric:.4g}"
        table.add_row(str(row.epoch), f"{row.loss:.4g}", metric, f"{row.seconds:.1f}")
    return table
