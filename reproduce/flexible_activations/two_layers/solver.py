"""Two flexible layers in a row, and their joint fit to values and Jacobians: an experiment, no part of the library.

`f(x) = W2 g2(W1 g1(W0 x + a0) + a1) + b`. Its Jacobians `W2 D2(x) W1 D1(x) W0`, D the slopes of the activations at x,
are slices of a ParaTuck decomposition (De Jonghe, Usevich, Dreesen and Ishteva). Here all parameters are fitted at
once, by SciPy's trust-region least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

import rankfold as rf

STEPS = 300  # of the trust region, at most
DEGREE = 3


def two_layers(sizes: Sequence[int]) -> nn.Sequential:
    """Return fresh flexible layers of sizes in, first rank, second rank, out: cubic polynomials, double precision."""
    into, first, second, out = sizes
    parts = (
        nn.Linear(into, first),
        rf.layers.FlexibleActivation(first, "legendre", DEGREE),
        nn.Linear(first, second),
        rf.layers.FlexibleActivation(second, "legendre", DEGREE),
        nn.Linear(second, out),
    )
    return nn.Sequential(*parts).double()


def one_layer(into: int, out: int, params: int) -> nn.Module:
    """Return one fresh flexible layer with at most so many parameters, of the same polynomials."""
    rank, layer = 1, rf.layers.FlexibleLinear(into, out, rank=1, basis="legendre", size=DEGREE)
    while sum(p.numel() for p in layer.parameters()) <= params:
        found, rank = layer, rank + 1
        layer = rf.layers.FlexibleLinear(into, out, rank=rank, basis="legendre", size=DEGREE)
    return found.double()


def scatter(model: nn.Module, seed: int, bend: float = 0.3) -> None:
    """Give every parameter a fresh value: weights that keep coordinates in [-1, 1], activations bent by so much."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            if name.endswith("coefficients"):
                parameter.copy_(bend * noise)
                parameter[:, 0] += 1
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(0.5 * noise / parameter.shape[1] ** 0.5)


def joint_fit(
    model: nn.Module, inputs: Tensor, values: Tensor, jacobians: Tensor | None, seed: int
) -> tuple[nn.Module, float]:
    """Fit a fresh model in place from one random start; return it and the cost, the mean of the squared errors.

    The cost is the relative squared error of the values (samples, out), and with `jacobians` (samples, out, in) theirs
    added.
    """
    scatter(model, seed)
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    scale = [1 / (values - values.mean(0)).norm(), 0.0 if jacobians is None else 1 / jacobians.norm()]

    def parameters(flat: Tensor) -> Mapping[str, Tensor]:
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def residuals(flat: Tensor) -> Tensor:
        given = parameters(flat)
        missed = [(functional_call(model, given, inputs) - values).flatten() * scale[0]]
        if jacobians is not None:
            slopes = vmap(jacrev(lambda x: functional_call(model, given, x)))(inputs)
            missed.append((slopes - jacobians).flatten() * scale[1])
        return torch.cat(missed)

    start = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    slopes = jacfwd(residuals)
    found = least_squares(
        lambda flat: _finite(residuals(torch.from_numpy(flat))),
        start,
        jac=lambda flat: _finite(slopes(torch.from_numpy(flat))),
        method="trf",
        max_nfev=STEPS,
    )
    model.load_state_dict(dict(parameters(torch.from_numpy(found.x))))
    return model, float(2 * found.cost)


def _finite(value: Tensor) -> np.ndarray:
    return np.nan_to_num(value.detach().numpy(), nan=1e6, posinf=1e6, neginf=-1e6)
