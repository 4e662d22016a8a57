"""Export a model to a program that runs without Rankfold, and check the result."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rankfold._common import atomic_path, device_of, evaluating, example_arguments, tensors_in, to_device
from rankfold.errors import ExportError
from rankfold.latency import Run, eager, onnx_bytes, onnx_run, quiet_export

Write: TypeAlias = Callable[[nn.Module, Any], bytes]
Load: TypeAlias = Callable[[str, Any], Run]

# Relative to the largest output: an exported program may sum in another order.
TOLERANCE = MappingProxyType({torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2})


@dataclass(frozen=True)
class Exported:
    """An exported program and how much its outputs on the example differed from the model's.

    Attributes:
        path: the file.
        format: "onnx" or "pt2".
        bytes: size of the file.
        difference: largest absolute difference in any output, divided by the largest absolute value of that output.
    """

    path: Path
    format: str
    bytes: int
    difference: float


def export(
    model: nn.Module, path: str | Path, *, example: Any, format: str | None = None, tolerance: float | None = None
) -> Exported:
    """Export a model to a file of plain operations, load it again and compare it with the model.

    The model is exported in eval mode (its modes are restored) for the shapes of the example. The file appears under
    its name only after the loaded program has returned the model's outputs.

    Args:
        model: any model, compressed or not.
        path: the file to write; an existing one is replaced.
        example: a tensor, a tuple of arguments or a dict of keyword arguments.
        format: "onnx" or "pt2" (`torch.export`); by default the suffix of the path.
        tolerance: largest difference allowed, relative to the largest output; by default 1e-4 in float32.

    Returns:
        The path and the measured difference.

    Raises:
        ExportError: the format is unknown, the exporter cannot trace the model, an optional package is missing, or the
            outputs differ by more than the tolerance.

    Example:
        >>> import tempfile, pathlib, torch
        >>> from rankfold.exporters import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = export(torch.nn.Linear(4, 3), pathlib.Path(folder) / "small.pt2", example=torch.randn(2, 4))
        >>> done.format, done.difference < 1e-6
        ('pt2', True)
    """
    path = Path(path)
    form = format or path.suffix.removeprefix(".")
    if form not in FORMATS:
        raise ExportError(f"{path.name}: there is no format {form!r}: end the name in .onnx or .pt2, or pass format=")
    write, load = FORMATS[form]
    with evaluating(model), torch.no_grad():
        wanted = tensors_in(eager(model, example)())
        content = _traced(write, model, example)
        with atomic_path(path) as unchecked:
            Path(unchecked).write_bytes(content)
            difference = _difference(wanted, tensors_in(load(str(unchecked), example)()))
            limit = tolerance if tolerance is not None else max(TOLERANCE.get(t.dtype, 0.0) for t in wanted)
            if not difference <= limit:
                raise ExportError(
                    f"{path.name}: the exported program differs from the model by {difference:.3g} (relative to the "
                    f"largest output), more than the tolerance {limit:.3g}; nothing was written"
                )
    return Exported(path=path, format=form, bytes=len(content), difference=difference)


def _traced(write: Write, model: nn.Module, example: Any) -> bytes:
    try:
        return write(model, example)
    except ExportError:
        raise
    except Exception as problem:  # the exporters raise many unrelated kinds of errors
        reason = str(problem).strip().split("\n")[0]
        raise ExportError(f"{type(model).__name__} cannot be exported: {type(problem).__name__}: {reason}") from problem


def _difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest relative difference over all outputs; infinite if they cannot be compared."""
    if not wanted:
        raise ExportError("the model returns no tensor, so an export cannot be checked")
    if [t.shape for t in wanted] != [t.shape for t in got]:
        shapes = [[tuple(t.shape) for t in side] for side in (wanted, got)]
        raise ExportError(f"the model returns shapes {shapes[0]}, the exported program {shapes[1]}")
    return max(_one_difference(a, b) for a, b in zip(wanted, got, strict=True))


def _one_difference(wanted: Tensor, got: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    wanted, got = wanted.detach().cpu().double(), got.detach().cpu().double()
    if torch.equal(wanted, got):
        return 0.0
    difference = (wanted - got).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float("inf") if difference.isnan() else float(difference)


def _pt2_bytes(model: nn.Module, example: Any) -> bytes:
    args, kwargs = example_arguments(to_device(example, device_of(model)))
    buffer = io.BytesIO()
    with quiet_export():
        torch.export.save(torch.export.export(model, args, kwargs), buffer)
    return buffer.getvalue()


def _pt2_run(path: str, example: Any) -> Run:
    with open(path, "rb") as file, quiet_export():
        program = torch.export.load(file).module()
    return eager(program, example)


FORMATS: Mapping[str, tuple[Write, Load]] = MappingProxyType(
    {"onnx": (onnx_bytes, onnx_run), "pt2": (_pt2_bytes, _pt2_run)}
)
