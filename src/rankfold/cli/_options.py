"""The options that commands share: one type per option, so that it reads the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from rankfold.cli._sources import DTYPES
from rankfold.latency import RUNTIMES
from rankfold.planning import METRICS
from rankfold.train import KINDS

Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:resnet18, timm:NAME, hf:DIRECTORY, or package.module:function (no arguments).",
    ),
]
Small: TypeAlias = Annotated[
    Path, typer.Argument(metavar="SMALL", help="A compressed model that `rankfold compress` or `rankfold.save` wrote.")
]
SmallOrNone: TypeAlias = Annotated[
    Path | None,
    typer.Argument(metavar="[SMALL]", help="A compressed model to train further; none with --svd."),
]
Weights: TypeAlias = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE.safetensors", help="Weights of the dense model.")
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="Where the model runs, such as cpu or cuda:0.")]
Example: TypeAlias = Annotated[
    str | None,
    typer.Option("--example", metavar="SIZES", help="Shape of one input batch, such as 1,3,224,224 (random values)."),
]
Dtype: TypeAlias = Annotated[
    str,
    typer.Option("--dtype", help=f"Dtype of the example: {', '.join(DTYPES)}. A model that takes tokens wants int64."),
]
Data: TypeAlias = Annotated[
    str | None,
    typer.Option("--data", metavar="package.module:function", help="A function that returns a loader of batches."),
]
Params: TypeAlias = Annotated[
    float | None, typer.Option("--params", metavar="FRACTION", help="Parameters to keep, 0 < x <= 1.")
]
Macs: TypeAlias = Annotated[
    float | None, typer.Option("--macs", metavar="FRACTION", help="Multiply-adds to keep, 0 < x <= 1.")
]
Bytes: TypeAlias = Annotated[
    float | None, typer.Option("--bytes", metavar="FRACTION", help="Bytes of the saved model to keep, 0 < x <= 1.")
]
Latency: TypeAlias = Annotated[
    float | None,
    typer.Option("--latency", metavar="FRACTION", help="Latency to keep, 0 < x <= 1, measured on this machine."),
]
Methods: TypeAlias = Annotated[
    str, typer.Option("--methods", metavar="LIST", help="Methods the planner may mix: svd, tucker, cp, tt.")
]
Split: TypeAlias = Annotated[
    str | None,
    typer.Option("--svd", metavar="SPLIT", help="Train the dense model in SVD form: spatial or channel; then prune."),
]
Kind: TypeAlias = Annotated[str, typer.Option("--kind", help=f"Penalty on singular values: {', '.join(KINDS)}.")]
Sparsity: TypeAlias = Annotated[float, typer.Option("--sparsity", help="Weight of the penalty on singular values.")]
Orthogonality: TypeAlias = Annotated[
    float, typer.Option("--orthogonality", help="Weight of the penalty that keeps singular vectors orthonormal.")
]
Energy: TypeAlias = Annotated[
    float | None,
    typer.Option("--energy", metavar="SHARE", help="Prune to this share of each layer's squared singular values."),
]
Tune: TypeAlias = Annotated[int, typer.Option("--tune", min=0, help="Epochs of training after pruning.")]
Rule: TypeAlias = Annotated[str, typer.Option("--rule", help="How ranks are chosen: optimal, uniform, energy, evbmf.")]
Init: TypeAlias = Annotated[
    str,
    typer.Option(
        "--init",
        help="What the plan is for: to decompose the weights, or random (from scratch; none is read, rule uniform).",
    ),
]
Include: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="Only layers of this name or pattern (may be repeated)."),
]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="No layers of this name or pattern (may be repeated)."),
]
Multiple: TypeAlias = Annotated[int, typer.Option("--multiple", min=1, help="Round ranks to multiples of this.")]
Metric: TypeAlias = Annotated[
    str,
    typer.Option(
        "--metric",
        help="What errors are of: auto (outputs where --data is given, else weights), "
        f"{', '.join(name for name, grade in METRICS.items() if not grade.rows)}.",
    ),
]
Recalibrate: TypeAlias = Annotated[
    bool, typer.Option("--recalibrate/--no-recalibrate", help="With --data, fit the new layers to the inputs they get.")
]
Batches: TypeAlias = Annotated[
    int | None, typer.Option("--batches", min=1, help="Batches of --data to read at most; by default all.")
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", help="Seed of every random step.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
PlanIn: TypeAlias = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE.json", help="Apply this plan instead of making one.")
]
ReportOut: TypeAlias = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write a report too: .md, .json or .txt.")
]
Evaluate: TypeAlias = Annotated[
    str | None,
    typer.Option("--evaluate", metavar="package.module:function", help="A function from a model to its accuracy."),
]
Runtime: TypeAlias = Annotated[
    str, typer.Option("--runtime", help=f"Where latency is measured: {', '.join(RUNTIMES)}.")
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads for the measurement of latency.")
]
