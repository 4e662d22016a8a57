"""Latency: time layers and whole models on the user's device, in a runtime, and cache the times of layers."""

from rankfold.latency._layers import time_layers
from rankfold.latency._race import Latency, Timing, fastest_layout, steady_clock, time_models, using_threads
from rankfold.latency._runtimes import RUNTIMES, Run, Runtime, RuntimeRow, eager, onnx_bytes, onnx_run, quiet_export

__all__ = [
    "Latency",
    "RUNTIMES",
    "Run",
    "Runtime",
    "RuntimeRow",
    "Timing",
    "eager",
    "fastest_layout",
    "onnx_bytes",
    "onnx_run",
    "quiet_export",
    "steady_clock",
    "time_layers",
    "time_models",
    "using_threads",
]
