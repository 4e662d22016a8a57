"""Save and load compressed models: safetensors files with the plan in the header, without pickle."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import device_of, read_tensors, read_texts, some, write_tensors
from rankfold.errors import MethodError, PlanError, RankfoldError, StoreError
from rankfold.layers import is_factorised
from rankfold.planning import Choice, Plan, block_difference, is_block
from rankfold.surgery import apply

PLAN, FORMAT, WRITER = "rankfold", "rankfold_format", "rankfold_version"  # the entries of the header
READS = "1"  # the format that this version writes and reads

Path = str | os.PathLike[str]


def save(model: nn.Module, plan: Plan, path: Path) -> None:
    """Write a model's weights and its plan to a safetensors file.

    Tied weights are written once. The file is first written next to `path` and replaces it when it is complete, so that
    a failure or Ctrl-C leaves an old file intact.

    Args:
        model: the model that `apply` made from the plan, trained since or not, on any device.
        plan: the plan, from which `load` builds the model's layers.
        path: the file to write or replace, usually `….safetensors`.

    Raises:
        PlanError: the model's layers are not those of the plan.
        StoreError: a tensor has no values (meta device) or cannot be stored, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> plan = Plan({"0": Choice("dense", reason="small")})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(nn.Sequential(nn.Linear(4, 3)), plan, f"{folder}/small.safetensors")
        ...     model = load(f"{folder}/small.safetensors", nn.Sequential(nn.Linear(4, 3)))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    _check_plan(model, plan)
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise StoreError(f"{name} is a {type(value).__name__}: only a state of tensors alone can be saved")
    write_tensors(path, state, {PLAN: plan.to_json(), FORMAT: READS, WRITER: _version()})


def load(path: Path, skeleton: nn.Module, *, device: torch.device | str | None = None) -> nn.Module:
    """Return the model saved in a file, built on a dense skeleton.

    The plan in the file is applied to a copy of the skeleton on the meta device, which is then filled with the weights
    in the file. The weights of the skeleton are neither copied nor changed. Nothing in the file is executed.

    Args:
        path: a file that `save` wrote.
        skeleton: the dense model that the plan was made for, with any weights, or on the meta device with none. Modes,
            requires_grad, hooks and buffers that are not in a state_dict are taken from it.
        device: device of the new model; by default that of the skeleton, or the CPU if that is the meta device.

    Returns:
        A new model, with the same tied weights as the saved one.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is damaged, of another kind or of a later format, or does not fit the skeleton.
    """
    place = _place(device, skeleton)
    plan, tensors = _read(path)
    try:
        model = apply(_without_values(skeleton), plan, init="random")
    except RankfoldError as problem:
        raise StoreError(f"{os.fspath(path)}: its plan does not fit the skeleton: {problem}") from problem
    state = model.state_dict()  # including the versions of modules, which some need to load their state
    _check_tensors(path, state, tensors)
    state.update(_on(place, tensors, model))
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as problem:
        raise StoreError(f"{os.fspath(path)} does not fit the skeleton: {problem}") from problem
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise StoreError(
            f"{os.fspath(path)} has no values for {some(empty)}, and the skeleton has them on the meta device only: "
            "build the skeleton on the CPU"
        )
    return model.to(place)


def read_plan(path: Path) -> Plan:
    """Return the plan in a file that `save` wrote, without reading any weights.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is damaged, of another kind or of a later format.
    """
    return _plan(path, read_texts(path))


def _place(device: torch.device | str | None, skeleton: nn.Module) -> torch.device:
    if device is None:
        found = device_of(skeleton)
        return torch.device("cpu") if found.type == "meta" else found
    if torch.device(device).type == "meta":
        raise StoreError("a model is loaded onto a device with memory, not onto meta: leave device= out for the CPU")
    return torch.device(device)


def _read(path: Path) -> tuple[Plan, dict[str, Tensor]]:
    plan = read_plan(path)  # first, so that any other file is refused before its tensors are read
    tensors, _ = read_tensors(path)
    return plan, tensors


def _plan(path: Path, texts: Mapping[str, str]) -> Plan:
    if PLAN not in texts:
        raise StoreError(
            f"{os.fspath(path)} is a safetensors file without a plan, not one that rankfold.save wrote: load it with "
            "safetensors.torch.load_file, or compress the model first"
        )
    if texts.get(FORMAT) != READS:
        raise StoreError(
            f"{os.fspath(path)} has format {texts.get(FORMAT)!r}, written by Rankfold {texts.get(WRITER, 'unknown')}; "
            f"this version reads {READS!r}: install a later Rankfold"
        )
    try:
        return Plan.from_json(texts[PLAN])
    except MethodError as problem:
        raise StoreError(f"{os.fspath(path)}: {problem}") from problem
    except PlanError as problem:
        raise StoreError(f"{os.fspath(path)}: the plan in it is damaged: {problem}") from problem


def _check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise unless the factorised layers of the model are those of the plan, with its methods, ranks and options."""
    modules = dict(model.named_modules(remove_duplicate=False))
    planned = set()
    for name, choice in plan.layers.items():
        if name not in modules and not is_block(choice):
            raise PlanError(f"the plan names a layer {name!r} that the model does not have")
        problem = block_difference(modules, name, choice) if is_block(choice) else _difference(modules[name], choice)
        if problem:
            raise PlanError(f"layer {name!r} is not what the plan says: {problem}; save with the plan it was made from")
        planned.add(id(modules[name.partition(":")[0] if is_block(choice) else name]))
    for name, module in modules.items():
        if is_factorised(module) and id(module) not in planned:
            raise PlanError(
                f"layer {name!r} is a {type(module).__name__} that the plan does not name: it could not be loaded"
            )


def _difference(layer: Any, choice: Choice) -> str:
    if not is_factorised(layer):
        return "" if choice.method == "dense" else f"a dense {type(layer).__name__} where it says {choice.method!r}"
    if choice.method == "dense":
        return f"a {type(layer).__name__} where it says dense"
    if layer.method != choice.method or layer.rank != choice.rank:
        return f"{layer.method!r} of rank {layer.rank} where it says {choice.method!r} of rank {choice.rank}"
    options = {name: value for name, value in choice.options.items() if layer.options.get(name) != value}
    return f"options {dict(layer.options)} where it says {options}" if options else ""


def _without_values(skeleton: nn.Module) -> nn.Module:
    """Return a copy of a model with its parameters and persistent buffers on the meta device."""
    lazy = [name for name, p in skeleton.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise StoreError(f"{some(lazy)} of the skeleton has no shape yet: call the skeleton once on an example")
    stand_ins: dict[int, Any] = {}
    for parameter in skeleton.parameters():
        empty = torch.empty_like(parameter, device="meta")
        stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for module in skeleton.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                stand_ins[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        return copy.deepcopy(skeleton, stand_ins)
    except (RuntimeError, TypeError) as problem:
        raise StoreError(
            f"the skeleton cannot be copied ({problem}): build it again, without cached results"
        ) from problem


def _check_tensors(path: Path, wanted: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    different = [
        f"{name} ({_form(found[name])} in the file, {_form(tensor)} in the skeleton)"
        for name, tensor in wanted.items()
        if name in found and _form(found[name]) != _form(tensor)
    ]
    problems = [("lacks", missing), ("has beside those of the skeleton", surplus), ("differs in", different)]
    told = "; ".join(f"it {what} {some(names)}" for what, names in problems if names)
    if told:
        raise StoreError(
            f"{os.fspath(path)} does not fit the skeleton: {told}. The skeleton must be the model that the "
            "plan was made for, in the dtype that was saved"
        )


def _on(device: torch.device, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Move tensors to a device and turn those of parameters into parameters; tied tensors stay tied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made: dict[tuple[int, bool], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = (id(tensor), name in parameters)
        if key not in made:
            moved = tensor.to(device)
            made[key] = nn.Parameter(moved, parameters[name].requires_grad) if name in parameters else moved
        state[name] = made[key]
    return state


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _version() -> str:
    try:
        return version("rankfold")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
