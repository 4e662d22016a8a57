"""Functions with one hidden layer, sampled: what a flexible layer is to find again."""

import torch
from torch import nn

ACTS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def block(act="relu", sizes=(8, 5, 8), seed=0, dtype=torch.float64):
    """Return a Linear-activation-Linear block with random weights."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for into, out in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(into, out, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(out, into, generator=generator, dtype=torch.float64) / into**0.5)
            layer.bias.copy_(0.3 * torch.randn(out, generator=generator, dtype=torch.float64))
        layers += [layer, ACTS[act]()]
    return nn.Sequential(*layers[:-1])


def sampled(function, samples=160, into=8, seed=0):
    """Return Jacobians (out, in, samples) by autograd, values (out, samples) and inputs (in, samples)."""
    x = torch.randn(samples, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobians = torch.stack([torch.autograd.functional.jacobian(function, row) for row in x], -1)
    return jacobians, function(x).T.detach(), x.T


def neurons(chain):
    """Return the arguments of `Neurons` for a block of two linear layers."""
    first, _, last = chain
    return last.weight.detach(), first.weight.detach().T, first.bias.detach()
