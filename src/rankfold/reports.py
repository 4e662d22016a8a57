"""What compression did to a model: sizes, work, measured time, accuracy, and the error of every layer."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rankfold._common import atomic_path, device_of, evaluating, html_table, output_error
from rankfold.errors import LayerError, PlanError, RankfoldError
from rankfold.latency import Latency, Runtime, time_models
from rankfold.layers import is_factorised, stock_twin
from rankfold.planning import Choice, Plan, block_modules, is_block, joined, option_text
from rankfold.stats import Stats, count_bytes, count_params, measure
from rankfold.surgery import with_named_projections

WIDTH = 120
WORDS = frozenset({"model", "layer", "method", "reason"})  # columns that are flush left


@dataclass(frozen=True)
class Row:
    """One model of a report; what was not asked for is None.

    Attributes:
        model: "before" or "after".
        params: Parameters, shared ones counted once.
        bytes: Bytes of parameters and buffers as they are saved, shared ones counted once.
        macs: Multiply-adds per example.
        latency: Times measured side by side with the other row.
        accuracy: What `evaluate` returned.
        output_error: Relative error of the outputs against those of the dense model, measured on the data.
        predicted_error: What the plan predicted it to be.
    """

    model: str
    params: int
    bytes: int
    macs: int | None
    latency: Latency | None
    accuracy: float | None
    output_error: float | None = None
    predicted_error: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer of a report.

    Attributes:
        name: Qualified name in the model.
        method: Method of the plan, or "dense".
        rank: Rank of the plan, None for dense.
        options: Options of the method, such as the split of a low-rank convolution.
        params: Parameters before and after.
        macs: Multiply-adds per example, before and after.
        predicted_error: Relative error that the plan predicted, of the weight or in the plan's metric.
        weight_error: Relative Frobenius distance between the weight now and the dense weight.
        reason: Why the layer was left dense.
    """

    name: str
    method: str
    rank: int | tuple[int, ...] | None
    options: Mapping[str, Any]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    predicted_error: float | None
    weight_error: float | None
    reason: str | None


@dataclass(frozen=True)
class Report:
    """A comparison of a model before and after compression, with the conditions of the measurement.

    Attributes:
        rows: The model before and after.
        layers: One row per layer that the plan names.
        conditions: The plan's metric, versions, device type, dtype, threads, runtime and batch size.
    """

    rows: tuple[Row, ...]
    layers: tuple[LayerRow, ...]
    conditions: Mapping[str, str | int]

    def to_text(self) -> str:
        """Return the report as tables for a terminal."""
        out = io.StringIO()
        console = Console(file=out, width=WIDTH, highlight=False)
        for title, (heads, lines) in _tables(self).items():
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            for head in heads:
                table.add_column(head, justify="left" if head in WORDS else "right", overflow="fold")
            for line in lines:
                table.add_row(*line)
            console.print(table)
        console.print(_conditions(self))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def __str__(self) -> str:
        """Return the report as tables for a terminal."""
        return self.to_text()

    def _repr_html_(self) -> str:
        """Return the report as tables for a notebook."""
        tables = [
            html_table(heads, lines, left=WORDS, caption=title) for title, (heads, lines) in _tables(self).items()
        ]
        return "".join([*tables, f"<p>{escape(_conditions(self))}</p>"])

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        parts = ["# Compression report"]
        for title, (heads, lines) in _tables(self).items():
            rule = ["---" if head in WORDS else "---:" for head in heads]
            cells = [[cell.replace("|", "\\|") for cell in line] for line in [heads, rule, *lines]]
            parts += [f"## {title}", "\n".join("| " + " | ".join(line) + " |" for line in cells)]
        return "\n\n".join([*parts, _conditions(self)]) + "\n"

    def to_json(self) -> str:
        """Return the report with every sample of the measurement as JSON."""
        rows = [asdict(row) for row in self.rows]
        for row, data in zip(self.rows, rows, strict=True):
            if row.latency is not None:
                data["latency"] |= {"median": row.latency.median, "ratio": row.latency.ratio}
        value = {"rankfold_report": 1, "conditions": dict(self.conditions), "rows": rows}
        return json.dumps(value | {"layers": [asdict(layer) for layer in self.layers]}, indent=2) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the report; the suffix says how: .md, .json or .txt."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise RankfoldError(f"{path.name}: a report is written as {', '.join(SUFFIXES)}, not {path.suffix!r}")
        text = SUFFIXES[path.suffix](self)
        with atomic_path(path) as unfinished:
            Path(unfinished).write_text(text, encoding="utf-8")
        return path


SUFFIXES: Mapping[str, Callable[[Report], str]] = MappingProxyType(
    {".md": Report.to_markdown, ".json": Report.to_json, ".txt": Report.to_text}
)


def report(  # noqa: PLR0913
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    *,
    example: Any = None,
    loader: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    runtime: str | Runtime = "eager",
    threads: int | None = None,
    latency: bool = True,
) -> Report:
    """Compare a compressed model with the dense one it came from.

    Latencies are measured side by side in interleaved rounds (see `rankfold.latency.time_models`). The error of the
    small model's outputs, `|y' - y| / |y|`, is put next to what the plan predicted, which is meant for typical inputs:
    give a loader of those.

    Args:
        model: The dense model.
        small: The compressed model, recovered or not.
        plan: The plan it was compressed with.
        example: One batch for MACs and latency; without it both are left out.
        loader: Batches to measure the error of the outputs on, all of them; by default the example.
        evaluate: A function from a model to its accuracy, called in eval mode without autograd.
        runtime: Where latency is measured: "eager", "compile" or "onnxruntime".
        threads: Threads for the measurement; by default what torch is set to.
        latency: False leaves the measurement of time out.

    Returns:
        A `Report`; `print(report.to_text())`, `report.save("report.md")`.

    Raises:
        PlanError: Where the plan names layers that the models do not have.
    """
    model = with_named_projections(model, plan.layers)  # which the plan may have separated
    models = {"before": model, "after": small}
    _check_names(plan, models)
    data = loader if loader is not None else None if example is None else [(example,)]
    output_errors = {} if data is None else {"after": _output_error(model, small, data)}
    stats = {} if example is None else {name: measure(one, example=example) for name, one in models.items()}
    times: dict[str, Latency] = {}
    if latency and example is not None:
        times = time_models(models, example, runtime=runtime, threads=threads)
    rows = tuple(
        Row(
            model=name,
            params=count_params(one),
            bytes=count_bytes(one),
            macs=stats[name].macs if stats else None,
            latency=times.get(name),
            accuracy=None if evaluate is None else _accuracy(evaluate, one),
            output_error=output_errors.get(name),
            predicted_error=plan.output_error if name in output_errors else None,
        )
        for name, one in models.items()
    )
    layers = tuple(_layer_row(name, choice, models, stats) for name, choice in plan.layers.items())
    return Report(rows=rows, layers=layers, conditions=_conditions_of(model, plan, stats, times))


def _check_names(plan: Plan, models: Mapping[str, nn.Module]) -> None:
    for which, model in models.items():
        present = {name for name, _ in model.named_modules(remove_duplicate=False)}
        wanted = {name.partition(":")[0] if is_block(choice) else name for name, choice in plan.layers.items()}
        missing = wanted - present
        if missing:
            raise PlanError(
                f"the model {which} compression has no layer {sorted(missing)[0]!r} ({len(missing)} of "
                f"{len(plan.layers)} layers of the plan are missing): pass the models that the plan belongs to"
            )


def _block_row(name: str, choice: Choice, models: Mapping[str, nn.Module], stats: Mapping[str, Stats]) -> LayerRow:
    """Return the row of a layer that replaced a block: it has no weight to compare."""
    blocks = [block_modules(model, name) for model in models.values()]
    params = [sum(map(count_params, block.values())) for block in blocks]
    first = name.partition(":")[0]
    macs = [
        sum(seen.macs for key, seen in one.layers.items() if key in block or key.startswith(f"{first}."))
        for one, block in zip(stats.values(), blocks, strict=False)
    ]
    return LayerRow(
        name=name,
        method=choice.method,
        rank=choice.rank,
        options=dict(choice.options),
        params=(params[0], params[1]),
        macs=(macs[0], macs[1]) if stats else None,
        predicted_error=choice.error,
        weight_error=None,
        reason=choice.reason or None,
    )


def _layer_row(name: str, choice: Choice, models: Mapping[str, nn.Module], stats: Mapping[str, Stats]) -> LayerRow:
    if is_block(choice):
        return _block_row(name, choice, models, stats)
    dense, now = (model.get_submodule(name) for model in models.values())
    return LayerRow(
        name=name,
        method=choice.method,
        rank=choice.rank,
        options=dict(choice.options),
        params=(count_params(dense), count_params(now)),
        macs=(stats["before"].layers[name].macs, stats["after"].layers[name].macs) if stats else None,
        predicted_error=choice.error,
        weight_error=_weight_error(dense, now) if is_factorised(now) else None,
        reason=choice.reason or None,
    )


def _weight_error(dense: nn.Module, now: nn.Module) -> float:
    """Return the relative Frobenius distance between two layers' weights, in float64."""
    with torch.no_grad():
        wanted, weight = (_weight(layer).detach().to("cpu", torch.float64) for layer in (stock_twin(dense), now))
        return float(torch.linalg.vector_norm(weight - wanted) / torch.linalg.vector_norm(wanted))


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise LayerError(f"{type(layer).__name__} has no weight to compare")
    return weight


def _accuracy(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with evaluating(model), torch.no_grad():
        return float(evaluate(model))


def _output_error(model: nn.Module, small: nn.Module, loader: Iterable[Any]) -> float | None:
    found = output_error(model, small, loader)
    return None if math.isnan(found) else found


def _conditions_of(
    model: nn.Module, plan: Plan, stats: Mapping[str, Stats], times: Mapping[str, Latency]
) -> Mapping[str, str | int]:
    first = next(iter(model.parameters()), None)
    found: dict[str, str | int] = {"torch": torch.__version__, "device": device_of(model).type}
    if first is not None:
        found["dtype"] = str(first.dtype).removeprefix("torch.")
    if stats:
        found["batch"] = stats["before"].batch_size
    for time in times.values():
        found |= {"runtime": time.runtime, "threads": time.threads, "rounds": len(time.seconds)}
    if plan.latency and plan.dense.latency:
        found["promised latency"] = f"{plan.latency / plan.dense.latency:.1%} of dense"
    found["metric"] = plan.metric
    return MappingProxyType(found)


def _tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return title to heads and lines; columns without any value are left out."""
    before = report.rows[0]
    whole = [
        {
            "model": row.model,
            "params": _against(row.params, before.params),
            "MB": f"{row.bytes / 1e6:.3g}",
            "MACs": _against(row.macs, before.macs),
            "ms (quartiles)": _milliseconds(row.latency),
            "speed-up (quartiles)": _speed_up(row.latency),
            "accuracy": "" if row.accuracy is None else f"{row.accuracy:.4g}",
            "output error": _error(row.output_error),
            "predicted": _error(row.predicted_error),
        }
        for row in report.rows
    ]
    layers = [
        {
            "layer": row.name or "(model)",
            "method": " ".join([row.method, *(option_text(*item) for item in row.options.items())]),
            "rank": "" if row.rank is None else joined(row.rank),
            "params": _change(row.params),
            "MACs": _change(row.macs),
            "predicted error": _error(row.predicted_error),
            "weight error": _error(row.weight_error),
            "reason": row.reason or "",
        }
        for row in report.layers
    ]
    return {title: _columns(lines) for title, lines in {"Model": whole, "Layers": layers}.items() if lines}


def _columns(lines: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    return heads, [[line[head] for head in heads] for line in lines]


def _against(value: int | None, before: int | None) -> str:
    if value is None:
        return ""
    return f"{_short(value)} ({value / before:.1%})" if before else _short(value)


def _change(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return ""
    return _short(pair[0]) if pair[0] == pair[1] else f"{_short(pair[0])} → {_short(pair[1])}"


def _short(value: int) -> str:
    """Return a count to three digits with its unit; the exact one is in the JSON form."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            digits = 2 - int(math.log10(max(1.0, value / size)))
            return f"{value / size:.{digits}f} {unit}"
    return str(value)


def _milliseconds(time: Latency | None) -> str:
    return "" if time is None else "{:.3g} ({:.3g}-{:.3g})".format(*(1e3 * s for s in (time.median, *time.quartiles)))


def _speed_up(time: Latency | None) -> str:
    return "" if time is None else "{:.2f} ({:.2f}-{:.2f})".format(time.ratio, *time.ratio_quartiles)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _conditions(report: Report) -> str:
    text = ", ".join(f"{name} {value}" for name, value in report.conditions.items())
    return f"Measured with {text}. MACs are per example; errors are relative (Frobenius), predicted ones in the metric."
