"""The state of a training method in its own file, for training loops whose checkpoints have no room for it."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import Tensor

from rankfold._common import json_text, read_tensors, write_tensors
from rankfold.errors import StoreError
from rankfold.train.lowrank._method import TrainingMethod

KEY = "rankfold_method"


def split_state(run: TrainingMethod | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the plain values and the tensors of a method's state; both empty without a method."""
    state = {} if run is None else run.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in state.items() if name not in tensors}, tensors


def write_method(path: str | os.PathLike[str], run: TrainingMethod) -> None:
    """Write a method's state to a file, atomically."""
    plain, tensors = split_state(run)
    write_tensors(path, tensors, {KEY: json.dumps(plain)})


def read_method(path: str | os.PathLike[str], run: TrainingMethod) -> None:
    """Restore the state of a method from a file.

    Raises:
        StoreError: the file is damaged, or belongs to another method or to other layers.
    """
    tensors, texts = read_tensors(path)
    if KEY not in texts:
        raise StoreError(f"{os.fspath(path)} holds no training method")
    device = next(iter(run.layers.values())).weight.device
    run.load_state_dict({**json_text(path, texts, KEY), **{name: t.to(device) for name, t in tensors.items()}})
