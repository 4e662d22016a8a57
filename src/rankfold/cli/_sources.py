"""What the words of the command line name: models, weights, examples, data, functions."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from rankfold import hub
from rankfold.errors import DataError, RankfoldError, StoreError

DTYPES = MappingProxyType(
    {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32")}
)
CONVERT = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{name}', weights_only=True), "
    "'{stem}.safetensors')\""
)


class SourceError(RankfoldError):
    """A word of the command line names nothing usable."""


def function_of(spec: str) -> Callable[..., Any]:
    """Return the function that `package.module:function` names; modules in the working directory are found."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise SourceError(f"{spec!r} does not name a function: write package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as problem:  # whatever the user's module raises while it is imported
        raise SourceError(f"{module_name} cannot be imported: {_line(problem)}") from problem
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise SourceError(f"{module_name} has no {attribute!r}")
        found = getattr(found, name)
    if not callable(found):
        raise SourceError(f"{spec} is not a function but a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def called(spec: str) -> Any:
    """Return what the function that `spec` names returns without arguments."""
    function = function_of(spec)
    try:
        return function()
    except Exception as problem:  # whatever the user's function raises
        raise SourceError(f"{spec} failed: {_line(problem)}") from problem


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None)  # type: ignore[no-any-return]


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]


def _hugging_face(path: str) -> nn.Module:
    import transformers

    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no directory {path}: hf: takes one that save_pretrained wrote")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        hub.register()  # so that what was compressed before is loaded as such
    names = config.architectures or ["AutoModel"]
    return getattr(transformers, names[0]).from_pretrained(  # type: ignore[no-any-return]
        path, local_files_only=True, use_safetensors=True
    )


ZOOS: Mapping[str, Callable[[str], nn.Module]] = MappingProxyType(
    {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}
)
RANDOM = frozenset({"torchvision", "timm"})


def model_of(spec: str, weights: Path | None, device: str) -> nn.Module:
    """Return the model that `torchvision:NAME`, `timm:NAME`, `hf:PATH` or `package.module:function` names."""
    zoo, _, name = spec.partition(":")
    if zoo in ZOOS:
        try:
            model = ZOOS[zoo](name)
        except (RankfoldError, FileNotFoundError):
            raise
        except ImportError as problem:
            raise SourceError(f"{spec} needs a package that is missing: {_line(problem)}") from problem
        except Exception as problem:  # each zoo has errors of its own for an unknown name
            raise SourceError(f"{spec} cannot be built: {_line(problem)}") from problem
    else:
        model = called(spec)
    if not isinstance(model, nn.Module):
        raise SourceError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        _fill(model, weights)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA raises an AssertionError
        raise SourceError(f"the device {device!r} cannot be used: {_line(problem)}") from problem


def _fill(model: nn.Module, path: Path) -> None:
    if path.suffix != ".safetensors":
        convert = CONVERT.format(name=path.name, stem=path.stem)
        raise SourceError(f"{path.name} is not a .safetensors file; if you trust it, convert it once: {convert}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        load_model(model, path)
    except SafetensorError as problem:
        raise StoreError(f"{path.name} is damaged or not a safetensors file: {_line(problem)}") from problem
    except RuntimeError as problem:  # what load_state_dict raises
        reason = " ".join(str(problem).split())
        raise StoreError(f"{path.name} does not fit {type(model).__name__}: {reason:.300}") from problem


def example_of(shape: str, dtype: str) -> Tensor:
    """Return an example input: normal random numbers, or zeros for an integer dtype (a valid token everywhere)."""
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError as problem:
        raise SourceError(f"--example takes sizes such as 1,3,224,224, not {shape!r}") from problem
    if min(sizes) < 1:
        raise SourceError(f"--example takes sizes of at least 1, not {shape!r}")
    if dtype not in DTYPES:
        raise SourceError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if not DTYPES[dtype].is_floating_point:
        return torch.zeros(sizes, dtype=DTYPES[dtype])
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])


@contextmanager
def fitting_input() -> Iterator[None]:
    """Turn what torch says when a model is called with the wrong input into one error of ours."""
    try:
        yield
    except RankfoldError:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError, AssertionError) as problem:
        raise DataError(f"the model cannot be called with this input: {_line(problem)}") from problem


def fresh(path: Path | None, force: bool) -> None:
    """Refuse, before any work is done, a file that could not be written or would replace another."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} to")
    if path.exists() and not force:
        raise SourceError(f"{path} exists: choose another name, or add --force to replace it")


def apart(one: Path | None, other: Path | None) -> None:
    """Refuse two outputs in one file."""
    if one is not None and other is not None and one.resolve() == other.resolve():
        raise SourceError(f"{one} is named for two outputs: give each a file of its own")


def _line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}" if not isinstance(problem, RankfoldError) else lines[0]
