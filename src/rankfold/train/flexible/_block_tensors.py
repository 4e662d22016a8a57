"""A block's values and Jacobians at samples, in a few coordinates that suit its data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rankfold.decompose import Basis, Coupled, Neurons, coupled
from rankfold.errors import DataError
from rankfold.train.flexible._block_data import Block

FLOOR = 1e-4  # of the mean variance of the inputs, added in every direction
ROOM = 16  # coordinates beyond twice the rank that a compressed Jacobian keeps
GRADIENT_SAMPLES = 512  # samples whose gradients determine these coordinates
PROBES = 16  # random combinations of outputs whose gradients determine the directions that matter
COPIES = 6  # copies of the Jacobians that the solver makes at most
TEMPORARY = 1 << 22  # entries of the products that are formed at once
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "tanh": "tanh", "silu": "gelu", "swish": "gelu", "sigmoid": "tanh"}


@dataclass(frozen=True, eq=False)
class Frame:
    """Compressed coordinates of a block's inputs and outputs: `x = mean + into z`, `y = onto w`.

    The samples have unit variance in z, so a Jacobian counts in each direction as much as the inputs vary in it.

    Attributes:
        mean: mean of the inputs (in,).
        into: maps the coordinates to the inputs (in, kept).
        back: maps the inputs, less their mean, to the coordinates (kept, in).
        onto: orthonormal directions of the outputs (out, kept).
    """

    mean: Tensor
    into: Tensor
    back: Tensor
    onto: Tensor


def frame_of(block: Block, inputs: Tensor, rank: int, seed: int) -> Frame:
    """Return leading coordinates: of the inputs for the Jacobians, of the outputs for Jacobians and values."""
    mean = inputs.mean(0)
    centred = inputs - mean
    covariance = centred.T @ centred / len(inputs)
    covariance = covariance + FLOOR * covariance.diagonal().mean() * torch.eye(len(mean)).to(covariance)
    variances, axes = torch.linalg.eigh(covariance)
    deviations = variances.clamp_min(torch.finfo(variances.dtype).tiny).sqrt()
    into, back = axes * deviations, (axes / deviations).T
    chosen = _leading_inputs(block, inputs[:GRADIENT_SAMPLES], into, 2 * rank + ROOM, seed)
    into, back = into @ chosen, chosen.T @ back
    return Frame(mean, into, back, _leading_outputs(block, inputs[:GRADIENT_SAMPLES], into, 2 * rank + ROOM))


def _leading_inputs(block: Block, inputs: Tensor, into: Tensor, kept: int, seed: int) -> Tensor:
    """Return orthonormal columns (in, kept) that span most of the gradients of (random combinations of) the outputs."""
    if kept >= into.shape[1]:
        return torch.eye(into.shape[1]).to(into)
    out = block.linears[-1].out_features
    rows = torch.eye(out).to(into)
    if out > PROBES:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(PROBES, out, generator=generator, dtype=torch.float64).to(into)
    gram = torch.zeros_like(into)
    for part in _parts(block, inputs, len(rows)):
        gradients = block.probes(part, rows).flatten(0, 1) @ into
        gram += gradients.T @ gradients
    leading: Tensor = torch.linalg.eigh(gram)[1][:, -kept:].flip(1)
    return leading


def _leading_outputs(block: Block, inputs: Tensor, into: Tensor, kept: int) -> Tensor:
    """Return orthonormal columns (out, kept) that span most of the Jacobians and the values, with equal weight."""
    out = block.linears[-1].out_features
    if kept >= out:
        return torch.eye(out).to(into)
    values = block(inputs)
    values = values - values.mean(0)
    spread = values.T @ values
    gram = torch.zeros_like(spread)
    for part in _parts(block, inputs, into.shape[1]):
        unfolded = block.jacobians(part, into).transpose(0, 1).flatten(1)
        gram += unfolded @ unfolded.T
    together = gram / gram.trace() + spread / spread.trace()
    leading: Tensor = torch.linalg.eigh(together)[1][:, -kept:].flip(1)
    return leading


def _parts(block: Block, inputs: Tensor, columns: int) -> list[Tensor]:
    """Return the inputs in chunks, so that their products with this many columns stay small."""
    widest = max(max(layer.in_features, layer.out_features) for layer in block.linears)
    some = max(1, TEMPORARY // (widest * columns))
    return [inputs[start : start + some] for start in range(0, len(inputs), some)]


def affordable(frame: Frame, samples: int, rank: int, memory: float) -> int:
    """Return for how many samples the Jacobians and the solver's copies of them fit into `memory` bytes.

    Raises:
        DataError: these are fewer than the rank.
    """
    into, out = frame.into.shape[1], frame.onto.shape[1]
    fit = min(samples, int(memory / (8 * COPIES * into * out)))
    if fit < rank:
        raise DataError(
            f"memory={memory:.3g} bytes hold the Jacobians of {fit} samples ({out} x {into} each), fewer than the rank "
            f"{rank}: allow more memory, or a lower rank"
        )
    return fit


def solve_block(block: Block, inputs: Tensor, frame: Frame, rank: int, basis: Basis, seed: int) -> Coupled:
    """Return a flexible layer for a block, found in the frame's coordinates and expressed in the block's own."""
    values = block(inputs)
    jacobians = torch.cat(
        [frame.onto.T @ block.jacobians(part, frame.into) for part in _parts(block, inputs, frame.into.shape[1])]
    )
    own = _own_neurons(block, frame)
    found = coupled(
        jacobians.permute(1, 2, 0),
        (values @ frame.onto).T,
        frame.back @ (inputs - frame.mean).T,
        rank,
        basis=basis,
        starts=("cp", "linear"),
        initial=own,
        seed=seed,
    )
    right, left = frame.back.T @ found.right, frame.onto @ found.left
    offset = found.offset - right.T @ frame.mean
    lifted = replace(found, left=left, right=right, offset=offset, bias=frame.onto @ found.bias)
    return _values_fitted(lifted, inputs, values, exact=frame.onto.shape[1] == len(frame.onto))


def _values_fitted(found: Coupled, inputs: Tensor, values: Tensor, *, exact: bool) -> Coupled:
    """Return the layer with its bias, and its left factor if the outputs were compressed, fitted to all values."""
    hidden = replace(found, left=torch.eye(found.rank).to(inputs), bias=torch.zeros(found.rank).to(inputs))
    activity = hidden.evaluate(inputs.T).T
    left = found.left
    if not exact and len(inputs) > 2 * found.rank:
        centred = activity - activity.mean(0)
        gram = centred.T @ centred
        ridge = 1e-8 * gram.diagonal().mean() * torch.eye(found.rank).to(gram)
        left = torch.linalg.solve(gram + ridge, centred.T @ (values - values.mean(0))).T
    return replace(found, left=left, bias=values.mean(0) - left @ activity.mean(0))


def activation_of(block: Block) -> str:
    """Return which of relu, tanh and gelu the block's only activation is or resembles; "" for others or several."""
    acting = [stage for stage in block.stages if not isinstance(stage, nn.Linear | nn.Dropout | nn.Identity)]
    if len(acting) != 1 or len(block.linears) != 2:
        return ""
    name = type(acting[0]).__name__.lower()
    return next((known for part, known in ACTIVATIONS.items() if part in name), "")


def _own_neurons(block: Block, frame: Frame) -> Neurons | None:
    """Return the neurons of a block of two linear layers in the frame's coordinates; None for any other block."""
    activation = activation_of(block)
    if not activation:
        return None
    first, last = block.linears
    offset = first.weight @ frame.mean + (0 if first.bias is None else first.bias)
    return Neurons(frame.onto.T @ last.weight, frame.into.T @ first.weight.T, offset, activation)


def affine_error(block: Block, inputs: Tensor, held: Tensor) -> float:
    """Return the relative error on held-out inputs of the best affine map (fitted with a small ridge)."""
    values, wanted = block(inputs), block(held)
    mean, centre = inputs.mean(0), values.mean(0)
    centred = inputs - mean
    gram = centred.T @ centred
    ridge = FLOOR * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    slope = torch.linalg.solve(gram + ridge, centred.T @ (values - centre))
    missed = torch.linalg.vector_norm((held - mean) @ slope + centre - wanted)
    return float(missed / torch.linalg.vector_norm(wanted - wanted.mean(0)).clamp_min(1e-300))
