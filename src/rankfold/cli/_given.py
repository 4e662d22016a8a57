"""What the options that several commands share are turned into: an input, an example, a pair of models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import typer
from torch import nn

from rankfold._common import batch_arguments
from rankfold.cli._sources import RANDOM, SourceError, called, example_of, model_of
from rankfold.errors import DataError
from rankfold.planning import Plan
from rankfold.store import load, read_plan


def input_of(example: str | None, dtype: str, data: str | None, *, batches: int | None = None) -> dict[str, Any]:
    """Return what a model is measured with, as keyword arguments of `measure`.

    Of a generator this many batches are kept, to be read as often as it takes.
    """
    if (example is None) == (data is None):
        raise SourceError("give one of --example 1,3,224,224 and --data package.module:function")
    if example is not None:
        return {"example": example_of(example, dtype)}
    loader = called(str(data))
    return {"loader": list(islice(loader, batches)) if isinstance(loader, Iterator) and batches else loader}


def one_example(given: dict[str, Any]) -> Any:
    """Return one batch as an example."""
    if "example" in given:
        return given["example"]
    for batch in given["loader"]:
        args, kwargs = batch_arguments(batch)
        return args or kwargs
    raise DataError("the loader is empty: it must yield at least one batch")


def pair(model: str, weights: Path | None, small: Path, device: str) -> tuple[nn.Module, nn.Module, Plan]:
    """Return the dense model, the compressed one that the file holds, and the plan in the file."""
    if not small.is_file():
        raise FileNotFoundError(f"there is no file {small}")
    dense = model_of(model, weights, device)
    return dense, load(small, model_of(model, None, "cpu")).to(device), read_plan(small)


def note_random(model: str, weights: Path | None) -> None:
    """Say on standard error that a model has random weights, where it does."""
    if weights is None and model.partition(":")[0] in RANDOM:
        note(f"{model} has random weights: give trained ones with --weights FILE.safetensors")


def note(text: str) -> None:
    """Say something that is no result, on standard error."""
    typer.echo(text, err=True)
