"""The convolutional network of Garipov et al. 2016, dense, of TT-convolutions, and of tensor trains of the kernels."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from reproduce.training import params

C64, C128 = (4, 4, 4), (4, 8, 4)  # the modes of 64 and of 128 channels
MODES = {64: C64, 128: C128}
# In and out channels, padding, published bonds of the 3.26× configuration (the first layer stays dense).
LAYERS = {
    "conv1.1": (3, 64, 1, None),
    "conv1.2": (64, 64, 1, (22, 20, 20)),
    "conv2.1": (64, 128, 1, (27, 22, 22)),
    "conv2.2": (128, 128, 1, (23, 23, 23)),
    "conv3.1": (128, 128, 0, (23, 23, 23)),
    "conv3.2": (128, 128, 0, (23, 23, 23)),
}
POOLED = ("conv1.2", "conv2.2")
# In the network with fully connected layers, the 42.3× configuration: bonds of every convolution, then the layers.
BONDS_WITH_FC = (16, 16, 16)
FC_LAYERS = {
    "fc1": ((8, 8, 8, 16), (4, 6, 8, 8), (40, 40, 40)),
    "fc2": ((4, 6, 8, 8), (4, 4, 4, 8), (30, 30, 30)),
}
CLASSES = 10

Make = Callable[[str], nn.Module]


class KernelTT(nn.Module):
    """A convolution whose kernel is a plain tensor train over (height, width, in, out): the paper's "naive" one.

    `K[x, y, s, t] = G1[x] G2[:, y] G3[:, s] G4[:, t]`. The kernel is rebuilt in each forward pass. Every bond has
    one cap, clipped to what it can have.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, rank: int, padding: int = 0) -> None:
        super().__init__()
        self.modes, self.padding = (kernel_size, kernel_size, in_channels, out_channels), padding
        self.bonds = kernel_bonds(self.modes, rank)
        shapes = zip(self.bonds, self.modes, self.bonds[1:], strict=False)
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        variance = 1 / (3 * in_channels * kernel_size**2)  # of a fresh nn.Conv2d, as that of the library's layers
        deviation = (variance / math.prod(self.bonds)) ** (1 / 8)
        for core in self.cores:
            nn.init.normal_(core, std=deviation)

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in, height, width)."""
        product = self.cores[0].flatten(0, 1)
        for core in self.cores[1:]:
            product = (product @ core.flatten(1)).reshape(-1, core.shape[2])
        return product.reshape(self.modes).permute(3, 2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the rebuilt kernel."""
        return F.conv2d(x, self.weight, padding=self.padding)


def kernel_bonds(modes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return the bonds of a train over these modes, at most `rank`, and no larger than both sides allow."""
    cuts = range(1, len(modes))
    return (1, *(min(rank, math.prod(modes[:k]), math.prod(modes[k:])) for k in cuts), 1)


def kernel_weights(modes: tuple[int, ...], rank: int) -> int:
    """Return how many weights a plain train over these modes has."""
    bonds = kernel_bonds(modes, rank)
    return sum(left * mode * right for mode, (left, right) in zip(modes, pairwise(bonds), strict=True))


def tt_layer(name: str, bonds: tuple[int, ...] | None = None) -> nn.Module:
    """Return a TT-convolution with the published bonds, or these."""
    channels, filters, padding, published = LAYERS[name]
    return rf.layers.TTConv2d(
        channels,
        filters,
        3,
        padding=padding,
        bias=False,
        rank=bonds or published,
        in_shape=MODES[channels],
        out_shape=MODES[filters],
        redundant=True,
    )


def dense_layer(name: str) -> nn.Module:
    """Return the dense convolution."""
    channels, filters, padding, _ = LAYERS[name]
    return nn.Conv2d(channels, filters, 3, padding=padding, bias=False)


def naive_layer(name: str) -> nn.Module:
    """Return the plain train of the kernel whose number of weights is nearest to that of the TT-convolution."""
    channels, filters, padding, _ = LAYERS[name]
    return KernelTT(channels, filters, 3, rank=naive_rank(name), padding=padding)


def naive_rank(name: str) -> int:
    """Return the cap for all bonds of the plain train."""
    channels, filters, _, _ = LAYERS[name]
    aim, modes = params(tt_layer(name)), (3, 3, channels, filters)
    return min(range(1, filters + 1), key=lambda rank: abs(kernel_weights(modes, rank) - aim))


def low_rank_layer(name: str) -> nn.Module:
    """Return the two convolutions that express the same kernels as the plain train, whose bonds in space are full."""
    channels, filters, padding, _ = LAYERS[name]
    return rf.layers.LowRankConv2d(channels, filters, 3, padding=padding, bias=False, rank=naive_rank(name))


MAKE: dict[str, Make] = {
    "dense": dense_layer,
    "TT-conv": tt_layer,
    "naive": naive_layer,
    "low rank": low_rank_layer,
}


def network(kind: str) -> nn.Sequential:
    """Return the untrained network of a kind: six convolutions with BatchNorm, two poolings, the mean, ten outputs."""
    return nn.Sequential(OrderedDict(_modules(kind)))


def _modules(kind: str) -> Iterator[tuple[str, nn.Module]]:
    for name, (_, filters, _, _) in LAYERS.items():
        key = name.replace(".", "_")
        yield key, dense_layer(name) if name == "conv1.1" else MAKE[kind](name)
        yield f"{key}_norm", nn.BatchNorm2d(filters)
        yield f"{key}_relu", nn.ReLU()
        if name in POOLED:
            yield f"{key}_pool", nn.MaxPool2d(3, 2, padding=1)
    yield "mean", nn.AdaptiveAvgPool2d(1)
    yield "flatten", nn.Flatten()
    yield "output", nn.Linear(filters, CLASSES, bias=False)


def fc_layer(name: str) -> nn.Module:
    """Return a fully connected TT-layer of the network with 14 million parameters."""
    in_shape, out_shape, bonds = FC_LAYERS[name]
    return rf.layers.TTLinear(
        math.prod(in_shape),
        math.prod(out_shape),
        bias=False,
        rank=bonds,
        in_shape=in_shape,
        out_shape=out_shape,
        redundant=True,
    )
