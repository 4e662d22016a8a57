"""Layers that break one promise each: what the checks of `rankfold.testing` must see."""

import torch
from cases_own import PairLinear
from torch import nn

from rankfold.layers import Cost, Stages


class NoSizes(PairLinear):
    def __init__(self, *sizes, rank, **where):
        super().__init__(*sizes, rank=rank, **where)
        del self.in_features

    def to_dense(self):
        self.in_features = self.down.in_features
        dense = super().to_dense()
        del self.in_features
        return dense

    def draw(self, generator):
        nn.init.normal_(self.down.weight, generator=generator)


class SwallowsOptions(PairLinear):
    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None, **ignored):  # noqa: ARG003
        return super().from_dense(dense, rank=rank, seed=seed, metric=metric)


class TakesAnyRank(PairLinear):
    @classmethod
    def cost(cls, dense, calls, *, rank):
        return super().cost(dense, calls, rank=max(1, min(rank, cls.full_rank(dense))))


class OtherRank(PairLinear):
    @property
    def rank(self):
        return self.up.in_features + 1

    @classmethod
    def like(cls, dense, *, rank, seed=0, device=None):
        return super().like(dense, rank=min(rank, cls.full_rank(dense)), seed=seed, device=device)


class LosesBias(PairLinear):
    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        layer = super().from_dense(dense, rank=rank, seed=seed, metric=metric)
        layer.up.bias.data.zero_()
        return layer


class Rounded(PairLinear):
    def write(self, left, right):
        super().write(left.float(), right.float())


class OtherShape(PairLinear):
    def forward(self, input):
        return super().forward(input).flatten(0, -2)


class DoubleNorm(PairLinear):
    def squared_norm(self):
        return 2 * super().squared_norm()


class DetachedNorm(PairLinear):
    def squared_norm(self):
        return (self.up.weight.detach() @ self.down.weight).square().sum()


class OtherTwin(PairLinear):
    def to_dense(self):
        dense = super().to_dense()
        dense.weight.data *= 1.01
        return dense


class Detached(PairLinear):
    def forward(self, input):
        return self.up(nn.functional.linear(input, self.down.weight.detach()))


class DetachedInput(PairLinear):
    def forward(self, input):
        return super().forward(input.detach())


class Boasts(PairLinear):
    @classmethod
    def errors(cls, dense, ranks, *, seed=0, metric=None):
        return tuple(0.9 * error for error in super().errors(dense, ranks, seed=seed, metric=metric))


class Fears(PairLinear):
    @classmethod
    def errors(cls, dense, ranks, *, seed=0, metric=None):
        return tuple(error + 0.01 for error in super().errors(dense, ranks, seed=seed, metric=metric))


class RisingSpectrum(PairLinear):
    @classmethod
    def spectra(cls, dense):
        (spectrum,) = super().spectra(dense)
        return (type(spectrum)(spectrum.values.flip(0), spectrum.shape),)


class LargeGrid(PairLinear):
    @classmethod
    def rank_grid(cls, dense, *, multiple=1):
        return (*super().rank_grid(dense, multiple=multiple), cls.full_rank(dense))


class FallingGrid(PairLinear):
    @classmethod
    def rank_grid(cls, dense, *, multiple=1):
        return super().rank_grid(dense, multiple=multiple)[::-1]


class AnyMultiple(PairLinear):
    @classmethod
    def rank_grid(cls, dense, *, multiple=1):  # noqa: ARG003
        return super().rank_grid(dense)


class ForgetsBias(PairLinear):
    @classmethod
    def cost(cls, dense, calls, *, rank):
        found = super().cost(dense, calls, rank=rank)
        return Cost(found.params - dense.out_features, found.macs)


class Buffered(PairLinear):
    def __init__(self, *sizes, rank, **where):
        super().__init__(*sizes, rank=rank, **where)
        self.register_buffer("order", torch.arange(self.out_features, device=self.up.weight.device))


class DoubleWork(PairLinear):
    @classmethod
    def cost(cls, dense, calls, *, rank):
        found = super().cost(dense, calls, rank=rank)
        return Cost(found.params, 2 * found.macs)


class KeepsBias(PairLinear):
    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        layer = super().from_dense(dense, rank=rank, seed=seed, metric=metric)
        layer.up.bias.data.copy_(dense.bias)
        return layer


class BlindToMetric(PairLinear):
    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        layer = super().from_dense(dense, rank=rank, seed=seed)
        if metric is not None:
            change = dense.weight.double() - layer.weight.double()
            layer.up.bias.data += change @ metric.mean[0].to(change)
        return layer


class OneStage(PairLinear):
    """It says that it is two stages, and adds a third."""

    def __init__(self, *sizes, rank, **where):
        super().__init__(*sizes, rank=rank, **where)
        self.shift = nn.Parameter(torch.ones_like(self.up.bias))

    def forward(self, input):
        return super().forward(input) + self.shift


class OtherNames(PairLinear):
    stages = Stages()

    def __init__(self, *sizes, rank, **where):
        super().__init__(*sizes, rank=rank, **where)
        self.first, self.second = self.down, self.up
        del self.down, self.up

    rank = property(lambda self: self.second.in_features)
    weight = property(lambda self: self.second.weight @ self.first.weight)
    bias = property(lambda self: self.second.bias)

    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        made = PairLinear.from_dense(dense, rank=rank, seed=seed, metric=metric)
        layer = cls(*cls.sizes(dense), rank=rank, dtype=dense.weight.dtype)
        layer.first, layer.second = made.down, made.up
        return layer


class Shrinks(PairLinear):
    def write(self, left, right):
        super().write(0.99 * left, right)


class FreshStages(PairLinear):
    """Each stage begins as torch would make it."""

    def draw(self, generator):
        with torch.no_grad():
            self.down.weight.uniform_(-(self.in_features**-0.5), self.in_features**-0.5, generator=generator)
            self.up.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5, generator=generator)


class OneType(PairLinear):
    @classmethod
    def like(cls, dense, *, rank, seed=0, device=None):
        return super().like(dense, rank=rank, seed=seed, device=device).float()


class AlwaysTrains(PairLinear):
    @classmethod
    def like(cls, dense, *, rank, seed=0, device=None):
        return super().like(dense, rank=rank, seed=seed, device=device).train()


class AlwaysLearns(PairLinear):
    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        return super().from_dense(dense, rank=rank, seed=seed, metric=metric).requires_grad_(True)


class Widens(PairLinear):
    def forward(self, input):
        return super().forward(input).float()


class Overflows(PairLinear):
    def forward(self, input):
        return super().forward(input * 1e5) / 1e5


class RowByRow(PairLinear):
    def forward(self, input):
        return torch.stack([super(RowByRow, self).forward(row) for row in input])


class OnTheProcessor(PairLinear):
    @classmethod
    def like(cls, dense, *, rank, seed=0, device=None):  # noqa: ARG003
        return super().like(dense, rank=rank, seed=seed, device="cpu")


class SharesBias(PairLinear):
    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        layer = super().from_dense(dense, rank=rank, seed=seed, metric=metric)
        layer.up.bias = dense.bias
        return layer


class SharesTwin(PairLinear):
    def to_dense(self):
        dense = super().to_dense()
        dense.bias = self.up.bias
        return dense


class Remembers(PairLinear):
    """Part of it is neither a parameter nor a buffer."""

    scale = 1.0

    def forward(self, input):
        return super().forward(input) * self.scale

    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        layer = super().from_dense(dense, rank=rank, seed=seed, metric=metric)
        layer.scale = 2.0
        return layer


class Unseeded(PairLinear):
    def draw(self, generator):  # noqa: ARG002
        super().draw(None)


class OneSeed(PairLinear):
    def draw(self, generator):
        super().draw(generator.manual_seed(0))


BROKEN = {
    "contract": {
        NoSizes: "in_features of the layer is 'missing'",
        SwallowsOptions: "from_dense with an option that is none: nothing is raised",
        TakesAnyRank: "cost at rank 0",
        OtherRank: "its rank is 11, where 10 was given",
        LosesBias: "the layer has another bias",
    },
    "full_rank": {
        Rounded: "at full rank its output is off by",
        OtherShape: r"its output is \(6, 10\), not \(2, 3, 10\)",
    },
    "weight": {
        DoubleNorm: r"squared_norm\(\) is not that of the weight",
        DetachedNorm: r"the gradients of squared_norm\(\)",
        OtherTwin: r"to_dense\(\) has another weight",
    },
    "gradients": {Detached: "no gradient reaches down.weight", DetachedInput: "no gradient reaches the input"},
    "errors": {
        Boasts: r"errors promises 0.\d+ at rank 3, and the weight is off by",
        Fears: "errors promises 0.01 at full rank",
        RisingSpectrum: "the values of a spectrum are not descending",
    },
    "rank_grid": {
        LargeGrid: "rank_grid has a rank of 230 parameters, and the dense layer has 130",
        FallingGrid: "rank_grid does not ascend",
        AnyMultiple: r"rank 1 of rank_grid\(multiple=4\)",
    },
    "costs": {
        ForgetsBias: "cost says 66 parameters, and the layer has 76",
        Buffered: "its state holds 10 numbers that are no parameters",
    },
    "macs": {DoubleWork: r"cost says 2376 multiply-adds .* torch counts 1188"},
    "metric": {KeepsBias: "the mean output changes", BlindToMetric: "in the metric, and the outputs are off by"},
    "stages": {
        OneStage: r"it computes something else than up\(down\(input\)\)",
        OtherNames: "it has no down and no up",
        Shrinks: "from_dense of a weight of rank 3",
    },
    "initialisation": {FreshStages: "fresh weights have a squared norm of .* where a fresh dense layer's is 3.33"},
    "mode": {
        OneType: "parameters of from_dense are in",
        AlwaysTrains: "is not in the mode of the dense layer, training=False",
        AlwaysLearns: "requires_grad of up.bias of from_dense is not False",
    },
    "half_precision": {Widens: "its output is torch.float32", Overflows: "NaN or Inf"},
    "empty_batch": {RowByRow: "non-empty"},
    "meta": {OnTheProcessor: r"like\(device='meta'\) gives down.weight, up.weight, up.bias memory"},
    "copies": {
        SharesBias: "the layer shares memory with the dense layer",
        SharesTwin: r"to_dense\(\) shares memory with the layer",
        Remembers: "a layer with the same state computes something else",
    },
    "seeds": {Unseeded: "like with the same seed has other values", OneSeed: "the same values for every seed"},
    "saving": {Remembers: "what was loaded computes something else"},
}
"""Check -> the classes that it must refuse -> what it says of them, for a `Linear(12, 10)` at rank 3."""
