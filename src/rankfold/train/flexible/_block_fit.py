"""The last step of decoupling: fit all parameters of the layer to the block's values at many rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.layers import FlexibleLinear
from rankfold.train._fit import fit
from rankfold.train._recipe import Recipe
from rankfold.train.flexible._block_data import Block

PASSES, BATCH, RATE = 10, 256, 1e-3
FEWEST_STEPS = 750  # at least; with few rows there are more passes


@dataclass(frozen=True, eq=False)
class _Shuffled:
    """Batches of inputs and values, shuffled in each pass."""

    inputs: Tensor
    values: Tensor
    generator: torch.Generator

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator).to(self.inputs.device)
        for start in range(0, len(order), BATCH):
            at = order[start : start + BATCH]
            yield self.inputs[at], self.values[at]


def fitted_to_values(layer: FlexibleLinear, block: Block, inputs: Tensor, held: Tensor, seed: int) -> FlexibleLinear:
    """Return the layer after training it with AdamW on the values; unchanged if that is no better on held-out rows.

    Minimises the squared error of the values only; the Jacobians, from which the layer was found, are not used.
    """
    dtype = torch.promote_types(layer.up.weight.dtype, torch.float32)
    fitted = copy.deepcopy(layer).to(dtype)
    values = block(inputs)
    variance = float((values - values.mean(0)).square().mean()) or 1.0
    batches = _Shuffled(inputs.to(dtype), values.to(dtype), torch.Generator().manual_seed(seed))
    recipe = Recipe(
        loss=lambda got, wanted: F.mse_loss(got, wanted) / variance,
        decay=0.0,
        clip=math.inf,
        batchnorm=0,
        seed=seed,
        progress=False,
    )
    passes = max(PASSES, math.ceil(FEWEST_STEPS / len(batches)))
    fit(fitted, batches, epochs=passes, lr=RATE, recipe=recipe)
    fitted = fitted.to(layer.up.weight.dtype)
    before, after = (value_error(one, block, held) for one in (layer, fitted))
    return fitted if after < before else layer


def value_error(layer: FlexibleLinear, block: Block, inputs: Tensor, *, centred: bool = True) -> float:
    """Return the relative Frobenius error of the values; if `centred`, relative to their deviation from the mean."""
    wanted = block(inputs)
    with torch.no_grad():
        got = layer(inputs.to(layer.up.weight.dtype)).to(wanted.dtype)
    missed = torch.linalg.vector_norm(got - wanted)
    size = torch.linalg.vector_norm(wanted - wanted.mean(0) if centred else wanted)
    return float(missed / size.clamp_min(1e-300))
