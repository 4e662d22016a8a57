"""The options of the commands: one type per option, one object per command."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from rankfold.cli._sources import DTYPES, SourceError
from rankfold.latency import RUNTIMES
from rankfold.planning import METRICS, OBJECTIVES, RULES, Budget, Planning, plannable
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
    str, typer.Option("--methods", metavar="LIST", help=f"Methods the planner may mix: {', '.join(plannable())}.")
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
Rule: TypeAlias = Annotated[str, typer.Option("--rule", help=f"How ranks are chosen: {', '.join(RULES)}.")]
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
        f"{', '.join(name for name, grade in METRICS.items() if not grade.gradients)}.",
    ),
]
Objective: TypeAlias = Annotated[
    str,
    typer.Option(
        "--objective",
        help=f"What rule optimal makes small: auto (calibrated with --data, else squares), {', '.join(OBJECTIVES)}.",
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
    Path | None, typer.Option("--plan", metavar="FILE.json", help="Do what this plan says instead of making one.")
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


@dataclass(frozen=True, kw_only=True)
class Words:
    """What was typed; the fields of the classes below are the options of the commands, in their order.

    Attributes:
        typed: the names of the fields that were on the command line.
    """

    typed: frozenset[str] = field(default=frozenset())

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise a `SourceError` where one of these options was typed."""
        for name in names:
            if name in self.typed:
                raise SourceError(why.format(f"--{name.strip('_')}"))


@dataclass(frozen=True, kw_only=True)
class DenseWords(Words):
    """The dense model."""

    model: Model
    weights: Weights = None


@dataclass(frozen=True, kw_only=True)
class InputWords(DenseWords):
    """The dense model, and what it is run on."""

    example: Example = None
    dtype: Dtype = "float32"
    data: Data = None
    device: Device = "cpu"


@dataclass(frozen=True, kw_only=True)
class MeasureWords(InputWords):
    """`rankfold measure`."""

    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class PlanningWords(InputWords):
    """A budget and how to meet it."""

    params: Params = None
    macs: Macs = None
    bytes_: Bytes = None
    latency: Latency = None
    methods: Methods = "svd,tucker"
    rule: Rule = "optimal"
    include: Include = None
    exclude: Exclude = None
    multiple: Multiple = 1
    metric: Metric = "auto"
    objective: Objective = "auto"
    batches: Batches = None
    seed: Seed = 0

    def budget(self) -> Budget | None:
        """Return the budget; None for the one rule that finds ranks without."""
        limits = {"params": self.params, "macs": self.macs, "bytes": self.bytes_, "latency": self.latency}
        given = {quantity: share for quantity, share in limits.items() if share is not None}
        if not given and self.rule != "evbmf":
            raise SourceError("say how much to keep: --params 0.5, --macs 0.5, --bytes 0.5, --latency 0.5 or several")
        return Budget(**given) if given else None

    def planning(self) -> Planning:
        """Return how to plan."""
        same: dict[str, Any] = {
            name: getattr(self, name) for name in ("rule", "multiple", "metric", "objective", "batches", "seed")
        }
        same |= {"include": tuple(self.include or ()), "exclude": tuple(self.exclude or ())}
        return Planning(methods=listed(self.methods), **same)


@dataclass(frozen=True, kw_only=True)
class PlanWords(PlanningWords):
    """`rankfold plan`."""

    init: Init = "decompose"
    recalibrate: Recalibrate = True
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write the plan here.")] = None
    force: Force = False
    as_json: Json = False

    def planning(self) -> Planning:
        """Return how to plan, and what the plan is for."""
        rest: dict[str, Any] = {"init": self.init, "recalibrate": self.recalibrate}
        return replace(super().planning(), **rest)


@dataclass(frozen=True, kw_only=True)
class CompressWords(PlanningWords):
    """`rankfold compress`."""

    recalibrate: Recalibrate = True
    plan: PlanIn = None
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="The compressed model.")]
    report: ReportOut = None
    force: Force = False
    as_json: Json = False

    def planning(self) -> Planning:
        """Return how to plan, and what to do with the plan."""
        return replace(super().planning(), recalibrate=self.recalibrate)

    def after(self, made: Planning | None) -> Planning:
        """Return how a plan that is there was made, with what was typed now in place of it."""
        typed: dict[str, Any] = {name: getattr(self, name) for name in AFTER if name in self.typed}
        return replace(made or Planning(), **typed)


AFTER = ("recalibrate", "batches", "seed")  # options that count for a plan that is there, too
BEFORE = ("params", "macs", "bytes_", "latency", "methods", "rule", "include", "exclude", "multiple", "metric") + (
    "objective",
)


@dataclass(frozen=True, kw_only=True)
class TrainWords(DenseWords):
    """`rankfold train`."""

    small: SmallOrNone = None
    data: Annotated[
        str, typer.Option("--data", metavar="package.module:function", help="A function that returns a loader.")
    ]
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="The trained compressed model.")]
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 1
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Highest learning rate.")] = 1e-3
    teacher: Annotated[bool, typer.Option("--teacher/--no-teacher", help="Learn from the dense model too.")] = True
    evaluate: Evaluate = None
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help="Written every epoch; resumed from if there.")
    ] = None
    svd: Split = None
    kind: Kind = "hoyer"
    sparsity: Sparsity = 0.1
    orthogonality: Orthogonality = 1.0
    params: Params = None
    macs: Macs = None
    energy: Energy = None
    tune: Tune = 1
    example: Example = None
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the singular values.")] = None
    device: Device = "cpu"
    seed: Seed = 0
    force: Force = False
    as_json: Json = False

    def pruning(self, example: Any) -> dict[str, Any]:
        """Return the arguments of `prune`."""
        budgeted = self.params is not None or self.macs is not None
        if budgeted == (self.energy is not None):
            raise SourceError("say how far to prune: --macs 0.5, --params 0.5 or --energy 0.999")
        if self.macs is not None and example is None:
            raise SourceError("--macs needs --example 1,3,224,224: MACs depend on the input")
        limit = {"energy": self.energy} if not budgeted else {"budget": Budget(params=self.params, macs=self.macs)}
        return {**limit, "example": example}


SVD_ALONE = ("kind", "sparsity", "orthogonality", "params", "macs", "energy", "tune", "example", "plot")


@dataclass(frozen=True, kw_only=True)
class ReportWords(InputWords):
    """`rankfold report`."""

    small: Small
    evaluate: Evaluate = None
    runtime: Runtime = "eager"
    threads: Threads = None
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it: .md, .json or .txt.")] = None
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it too.")] = None
    force: Force = False
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class ExportWords(Words):
    """`rankfold export`."""

    model: Model
    small: Small
    example: Annotated[str, typer.Option("--example", metavar="SIZES", help="Shape of one batch: 1,3,224,224.")]
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The program: .onnx or .pt2.")]
    dtype: Dtype = "float32"
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Largest difference allowed, relative to the largest output.")
    ] = None
    force: Force = False
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class DemoWords(Words):
    """`rankfold demo`."""

    out: Annotated[
        Path, typer.Option("--out", metavar="DIRECTORY", help="Where the model, the report and the picture go.")
    ] = Path("rankfold-demo")
    seed: Seed = 0


def listed(text: str) -> tuple[str, ...]:
    """Return the words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
