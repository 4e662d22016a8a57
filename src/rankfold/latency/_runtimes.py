"""The table of runtimes: how models and layers are run, to time them or to check what an export wrote."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

from rankfold._common import device_of, example_arguments, one_of, tensors_in, to_device
from rankfold.errors import DataError, ExportError

Run: TypeAlias = Callable[[], Any]
Runtime: TypeAlias = Callable[[nn.Module, Any], Run]

OPSET = 18
LARGEST_ONNX = 2**31 - 1  # bytes of one protobuf message
NEEDS_ONNX = "this needs the optional packages of ONNX: pip install 'rankfold[onnx]'"

MACHINERY = r"(torch|onnx|onnxscript|onnx_ir)(\.|$)"
STALE_WEIGHTS = r"The tensor attributes? .* assigned during export"  # recurrent layers warn about a cache of theirs


@contextmanager
def quiet_export() -> Iterator[None]:
    """Hide warnings of the exporters about their own code; those about the user's code are shown."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=MACHINERY)
        warnings.filterwarnings("ignore", message=STALE_WEIGHTS, category=UserWarning)
        yield


def onnx_bytes(model: nn.Module, example: Any, *, opset: int = OPSET) -> bytes:
    """Return a model in ONNX format, in its current mode (call this in eval mode), for the shapes of an example."""
    args, kwargs = example_arguments(to_device(example, device_of(model)))
    try:
        with quiet_export():
            program = torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, opset_version=opset, verbose=False, external_data=False
            )
    except ImportError as problem:
        raise ExportError(f"{NEEDS_ONNX} ({problem})") from problem
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if program is None or size > LARGEST_ONNX:
        raise ExportError(f"{size / 1e9:.1f} GB of weights do not fit into one .onnx file (2 GB): export to .pt2")
    buffer = io.BytesIO()
    program.save(buffer)  # type: ignore[arg-type]  # takes a buffer too
    return buffer.getvalue()


def onnx_run(source: bytes | str, example: Any) -> Run:
    """Return a function that runs an ONNX model, given as bytes or a path, on an example with ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as problem:
        raise ExportError(f"{NEEDS_ONNX} ({problem})") from problem
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while waiting would slow down the other models being timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    inputs = [tensor.detach().cpu() for tensor in tensors_in(list(example_arguments(example)))]
    if len(names) != len(inputs):
        raise ExportError(
            f"the ONNX model takes {len(names)} inputs ({', '.join(names)}), the example has {len(inputs)}"
        )
    try:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    except TypeError as problem:
        raise ExportError(f"ONNX Runtime cannot be fed this dtype: {problem}; use float32 or float16") from problem
    return lambda: tuple(torch.from_numpy(output) for output in session.run(None, feed))


def eager(model: nn.Module, example: Any) -> Run:
    """Run a model in PyTorch without any preparation."""
    args, kwargs = example_arguments(to_device(example, device_of(model)))
    return lambda: model(*args, **kwargs)


def compiled(model: nn.Module, example: Any) -> Run:
    """Run a model through `torch.compile` for the shapes of the example; the first call compiles."""
    args, kwargs = example_arguments(to_device(example, device_of(model)))
    program = torch.compile(model, dynamic=False)
    return lambda: program(*args, **kwargs)


def onnxruntime_cpu(model: nn.Module, example: Any) -> Run:
    """Export a model to ONNX and run it with ONNX Runtime on the CPU."""
    return onnx_run(onnx_bytes(model, example), example)


def onnxruntime_layer(layer: nn.Module, example: Any) -> Run:
    """Run one layer with ONNX Runtime on the CPU, exported by tracing: the same nodes, exported 100 times as fast.

    Layers that cannot be traced are exported like whole models.
    """
    args, _ = example_arguments(to_device(example, device_of(layer)))
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns every caller that it is the older one of two exporters
            torch.onnx.export(layer, args, buffer, dynamo=False, opset_version=OPSET)  # type: ignore[arg-type]
    except (ImportError, RuntimeError, TypeError, ValueError):
        return onnxruntime_cpu(layer, example)
    return onnx_run(buffer.getvalue(), example)


@dataclass(frozen=True)
class RuntimeRow:
    """How models and layers run in one runtime.

    Attributes:
        model: prepares a whole model for an example and returns the function to time.
        layer: the same for a single layer, which should be quick because there are many.
        library: the package that does the work, if it is not torch; with another version, layers are timed again.
    """

    model: Runtime
    layer: Runtime
    library: str = ""


RUNTIMES: Mapping[str, RuntimeRow] = MappingProxyType(
    {
        "eager": RuntimeRow(eager, eager),
        # a single layer has nothing to fuse, and compiled it would call the same kernels: this saves seconds per layer
        "compile": RuntimeRow(compiled, eager),
        "onnxruntime": RuntimeRow(onnxruntime_cpu, onnxruntime_layer, "onnxruntime"),
    }
)


def runtime_of(runtime: str | Runtime) -> RuntimeRow:
    """Return the row of a runtime; a function is used for whole models and layers alike.

    Raises:
        DataError: the name is unknown.
    """
    if callable(runtime):
        return RuntimeRow(runtime, runtime)
    return RUNTIMES[one_of("runtime", runtime, RUNTIMES, other="a function (model, example) -> run", error=DataError)]
