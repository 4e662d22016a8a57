"""Load compressed Hugging Face models from the folders that their own `save_pretrained` wrote.

`rankfold.hub.from_pretrained(folder)` loads one. To load them by the classes of transformers, call
`rankfold.hub.register()` once per process, in the one that compressed the model too.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from torch import nn

from rankfold._common import some
from rankfold.errors import RankfoldError, StoreError
from rankfold.layers import is_factorised
from rankfold.surgery import CONFIG_ENTRY, apply, plan_of
from rankfold.surgery import register as register_layers


def register() -> None:
    """Make transformers able to load models that Rankfold has compressed, until the process ends.

    `compressed.save_pretrained(folder)` writes the plan into `config.json`. After `register`, every `from_pretrained`
    of transformers reads it, builds the factorised layers and fills them. Nothing else in Rankfold but
    `rankfold.hub.from_pretrained` calls it: compressing a model leaves transformers as it was.

    Without it, transformers warns about an unknown quantisation method and missing weights, and returns a dense model
    with random weights in place of the factors, even in the process that compressed the model.
    `rankfold.hub.from_pretrained` never returns such a model.

    Raises:
        RankfoldError: transformers is missing or too old.
    """
    register_layers(partial(apply, init="random"))


def from_pretrained(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Return the compressed model that `save_pretrained` wrote to a folder, of the class that was saved.

    Args:
        folder: a folder, or the name of a model on the hub.
        options: further keyword arguments of `from_pretrained` in transformers, such as `dtype` or `device_map`.

    Raises:
        RankfoldError: transformers is missing or too old.
        StoreError: the model was not compressed by Rankfold, or one of its weights is missing or doesn't fit.
    """
    register()
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    where = os.fspath(folder)
    try:
        plan_of(getattr(config, CONFIG_ENTRY, None))
    except RankfoldError as problem:
        raise StoreError(f"{where}: {problem}") from problem
    architecture: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    try:
        model, told = architecture.from_pretrained(folder, **options, output_loading_info=True)
    except RankfoldError as problem:
        raise StoreError(f"{where}: its plan does not fit {architecture.__name__}: {problem}") from problem
    inside = tuple(f"{name}." for name, module in model.named_modules() if is_factorised(module))
    wrong = [*told["unexpected_keys"], *(key for key in told["missing_keys"] if key.startswith(inside))]
    if wrong:
        raise StoreError(f"{where} does not fit its plan: see {some(sorted(wrong))}; save the model again")
    loaded: nn.Module = model
    return loaded
