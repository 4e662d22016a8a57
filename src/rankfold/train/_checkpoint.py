"""The state of a training run: in memory to go back to, and on disk to resume from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import json_text, read_tensors, write_tensors
from rankfold.errors import RankfoldError, StoreError
from rankfold.train._recipe import Epoch, Recipe
from rankfold.train.lowrank._method import TrainingMethod
from rankfold.train.lowrank._method_file import split_state

KEY = "rankfold_checkpoint"
FORMAT = 1
VOLATILE = (
    "progress",
    "checkpoint",
    "watch",
    "method",
)  # settings that may change when a run is resumed, or that check themselves


@dataclass(eq=False)
class State:
    """The state of a training run between two epochs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    generators: list[torch.Generator]
    rows: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_metric: float = -torch.inf
    kept: int = 0
    method: TrainingMethod | None = None


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, including those that `state_dict` leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy the values of a snapshot back into the model."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(values[name])


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, and restore their state afterwards."""
    before = _random_states(device)
    try:
        places = {"cpu": torch.device("cpu"), "device": device}
        seeded = {name: torch.Generator(place).manual_seed(seed).get_state() for name, place in places.items()}
        _set_random_states(device, seeded)
        yield
    finally:
        _set_random_states(device, before)


def loader_generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that the user gave to a `DataLoader`."""
    sources = (loader, getattr(loader, "sampler", None))
    found = [getattr(source, "generator", None) for source in sources]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def settings(recipe: Recipe, **others: Any) -> dict[str, Any]:
    """Return all settings that a resumed run must share with the run that it continues."""
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in VOLATILE}
    return {name: _name(value) if callable(value) else value for name, value in {**values, **others}.items()}


def write_checkpoint(path: str | os.PathLike[str], state: State, common: Mapping[str, Any]) -> None:
    """Write a run to a file, atomically.

    Raises:
        RankfoldError: the state of the optimiser has something other than tensors and numbers.
        StoreError: the file cannot be written.
    """
    optimizer = state.optimizer.state_dict()
    moments: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            room: dict[str, Any] = moments if isinstance(value, Tensor) else numbers
            room[f"{index}.{name}"] = value
    plain, remembered = split_state(state.method)
    header = {
        "format": FORMAT,
        "settings": common,
        "rows": [asdict(row) for row in state.rows],
        "kept": state.kept,
        "best_metric": state.best_metric,
        "groups": optimizer["param_groups"],
        "numbers": numbers,
        "method": plain,
    }
    try:
        text = json.dumps(header)
    except TypeError as problem:
        raise RankfoldError(
            f"{type(state.optimizer).__name__} cannot be kept in a checkpoint: its settings and state must be tensors "
            f"and numbers ({problem})"
        ) from problem
    rooms = {
        "model": named_tensors(state.model),
        "best": state.best or {},
        "optimizer": moments,
        "method": remembered,
        "random": _random_states(state.device),
        "loader": {str(i): generator.get_state() for i, generator in enumerate(state.generators)},
    }
    tensors = {f"{room}.{name}": tensor for room, content in rooms.items() for name, tensor in content.items()}
    write_tensors(path, tensors, {KEY: text})


def resume(path: str | os.PathLike[str], state: State, common: Mapping[str, Any]) -> None:
    """Restore the state of a run from a checkpoint.

    Raises:
        StoreError: the file is damaged, or belongs to another model or to a run with other settings; the model is
            then unchanged.
    """
    tensors, texts = read_tensors(path)
    if KEY not in texts:
        raise StoreError(
            f"{os.fspath(path)} is no checkpoint of a training run: give Recipe(checkpoint=…) another path"
        )
    header = json_text(path, texts, KEY)
    try:
        _compare(path, header["format"], FORMAT, "format")
        for name, value in json.loads(json.dumps(common)).items():
            _compare(path, header["settings"].get(name), value, name)
        _fill(path, state, header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        if isinstance(problem, StoreError):
            raise
        raise StoreError(f"{os.fspath(path)}: the checkpoint is incomplete or damaged: {problem!r}") from problem


def _fill(path: str | os.PathLike[str], state: State, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    rooms: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        room, _, rest = name.partition(".")
        rooms.setdefault(room, {})[rest] = tensor
    model = rooms.get("model", {})
    _compare(path, _shapes(model), _shapes(named_tensors(state.model)), "model")
    rows = [Epoch(**row) for row in header["rows"]]
    values: dict[int, dict[str, Any]] = {}
    for key, value in {**header["numbers"], **rooms.get("optimizer", {})}.items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = value
    state.optimizer.load_state_dict({"state": values, "param_groups": header["groups"]})
    _resume_method(path, state.method, header.get("method", {}), rooms.get("method", {}), state.device)
    _set_random_states(state.device, rooms["random"])
    for index, generator in enumerate(state.generators):
        generator.set_state(rooms["loader"][str(index)])
    best = rooms.get("best")
    state.best = {name: tensor.to(state.device) for name, tensor in best.items()} if best else None
    state.rows, state.kept, state.best_metric = rows, header["kept"], header["best_metric"]
    restore(state.model, model)


def _resume_method(
    path: str | os.PathLike[str],
    method: TrainingMethod | None,
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    _compare(path, plain.get("method"), None if method is None else type(method).__name__, "training method")
    if method is not None:
        method.load_state_dict({**plain, **{name: tensor.to(device) for name, tensor in tensors.items()}})


def _compare(path: str | os.PathLike[str], found: Any, wanted: Any, name: str) -> None:
    if found == wanted:
        return
    if isinstance(found, dict):
        different = next(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
        found, wanted, name = found.get(different), wanted.get(different), f"{name}'s {different}"
    raise StoreError(
        f"{os.fspath(path)} is the checkpoint of another run: its {name} is {found!r}, this run's {wanted!r}. "
        "Continue with the same model and settings, or remove the file to start again"
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(*_index(device))
    return states


def _set_random_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one MPS device, and its functions take none
