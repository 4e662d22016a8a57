"""The table of training methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from rankfold._common import one_of
from rankfold.errors import RankfoldError
from rankfold.train.lowrank._cuttlefish import Cuttlefish
from rankfold.train.lowrank._dlrt import DLRT
from rankfold.train.lowrank._lc import LC
from rankfold.train.lowrank._method import TrainingMethod
from rankfold.train.lowrank._nuclear import NuclearNorm
from rankfold.train.lowrank._pufferfish import Pufferfish
from rankfold.train.lowrank._svd_form import svd_form
from rankfold.train.lowrank._svd_training import SVDTraining
from rankfold.train.lowrank._targets import Patterns
from rankfold.train.lowrank._trp import TRP

METHODS: Mapping[str, type[TrainingMethod]] = MappingProxyType(
    {
        "svd": SVDTraining,
        "trp": TRP,
        "nuclear": NuclearNorm,
        "pufferfish": Pufferfish,
        "cuttlefish": Cuttlefish,
        "dlrt": DLRT,
        "lc": LC,
    }
)


def training_method(
    name: str,
    model: nn.Module,
    *,
    split: str = "spatial",
    include: Patterns = (),
    exclude: Patterns = (),
    **options: Any,
) -> TrainingMethod:
    """Return a training method by name, for a dense model.

    Train the method's `.model`: a new one in SVD form for "svd", and the given one for all other methods.

    Args:
        name: "svd", "trp", "nuclear", "pufferfish", "cuttlefish", "dlrt" or "lc".
        model: a dense model. All methods but "svd" train it in place.
        split: how kernels are split, "spatial" or "channel".
        include: names or patterns of the layers to work on; all layers if empty.
        exclude: names or patterns of layers to leave alone.
        options: further keyword arguments of the method's class.

    Raises:
        RankfoldError: the name is unknown, or the method has no such option.
        LayerError: no layer can be trained for low rank.

    Example:
        >>> run = training_method("svd", nn.Sequential(nn.Linear(8, 8)), kind="l1")
        >>> type(run).__name__, type(run.model[0]).__name__
        ('SVDTraining', 'SVDLinear')
    """
    one_of("method", name, METHODS)
    places: dict[str, Any] = {"split": split, "include": include, "exclude": exclude}
    build: Any = METHODS[name]
    if build.in_form:
        model, places = svd_form(model, **places)[0], {}
    try:
        run: TrainingMethod = build(model, **places, **options)
    except TypeError as problem:
        raise RankfoldError(f"method {name!r}: {problem}") from problem
    return run
