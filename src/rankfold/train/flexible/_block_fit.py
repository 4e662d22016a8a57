"""The last step of decoupling: every parameter of the layer fitted to the block's values at many rows."""

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
LEAST_STEPS = 750  # few rows are passed over more often


@dataclass(frozen=True, eq=False)
class _Shuffled:
    """Batches of inputs and values, in another order in each pass."""

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
    """Return the layer after some passes of AdamW over the values; as it was where that is no better on held-out rows.

    It minimises the squared error of the values; their Jacobians, which led to the layer, have no part in it.
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
    passes = max(PASSES, math.ceil(LEAST_STEPS / len(batches)))
    fit(fitted, batches, epochs=passes, lr=RATE, recipe=recipe)
    fitted = fitted.to(layer.up.weight.dtype)
    before, after = (value_error(one, block, held) for one in (layer, fitted))
    return fitted if after < before else layer


def value_error(layer: FlexibleLinear, block: Block, inputs: Tensor, *, centred: bool = True) -> float:
    """Return the relative Frobenius error of the values, if `centred` from their mean over these inputs."""
    wanted = block(inputs)
    with torch.no_grad():
        got = layer(inputs.to(layer.up.weight.dtype)).to(wanted.dtype)
    missed = torch.linalg.vector_norm(got - wanted)
    size = torch.linalg.vector_norm(wanted - wanted.mean(0) if centred else wanted)
    return float(missed / size.clamp_min(1e-300))
