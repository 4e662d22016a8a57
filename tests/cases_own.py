"""Layers of a user's own, written from the contract alone: what `rankfold.layers.register` takes."""

import torch
from torch import nn

from rankfold import decompose
from rankfold.layers import Cost, Spectrum, Stages


class _Pair(nn.Module):
    """Two stages whose product is the weight, kept unbalanced: the second has orthonormal columns."""

    method = "pair"
    stages = Stages()

    @property
    def rank(self):
        return self.up.in_features

    @property
    def options(self):
        return {}

    def forward(self, input):
        return self.up(self.down(input))

    def squared_norm(self):
        return self.weight.square().sum()

    @classmethod
    def variants(cls, dense):
        return ({},) if cls.rank_grid(dense) else ()

    @classmethod
    def full_rank(cls, dense):
        return min(dense.weight.shape)

    @classmethod
    def rank_grid(cls, dense, *, multiple=1):
        rows, columns = dense.weight.shape
        return tuple(r for r in range(multiple, min(rows, columns), multiple) if r * (rows + columns) < rows * columns)

    @classmethod
    def errors(cls, dense, ranks, *, seed=0, metric=None):  # noqa: ARG003 - exact
        values = decompose.singular_values(dense.weight.detach(), **_weighted(dense, metric))
        total = float(values.square().sum())
        ranks = [_checked(dense, rank) for rank in ranks]
        return tuple(float((values[rank:].square().sum() / total).sqrt()) if total else 0.0 for rank in ranks)

    @classmethod
    def spectra(cls, dense):
        return (Spectrum(decompose.singular_values(dense.weight.detach()), tuple(dense.weight.shape)),)

    @classmethod
    def from_dense(cls, dense, *, rank, seed=0, metric=None):
        factors = decompose.svd(dense.weight.detach(), _checked(dense, rank), seed=seed, **_weighted(dense, metric))
        layer = cls.like(dense, rank=rank)
        with torch.no_grad():
            layer.write(factors.u, factors.s[:, None] * factors.vh)
            if getattr(dense, "bias", None) is not None:
                change = (dense.weight.double() - layer.weight.double()) if metric is not None else None
                shift = 0 if change is None else change @ metric.mean[0].to(change)
                layer.bias.copy_(dense.bias + shift)
        return layer

    @classmethod
    def like(cls, dense, *, rank, seed=0, device=None):
        if type(dense) is not cls.dense_type:
            raise ValueError(f"{cls.__name__} stands for {cls.dense_type.__name__}, not for {type(dense).__name__}")
        where = {"device": dense.weight.device if device is None else device, "dtype": dense.weight.dtype}
        layer = cls(*cls.sizes(dense), rank=_checked(dense, rank), **where)
        for name, parameter in layer.named_parameters():
            source = dense.bias if name.endswith("bias") else dense.weight
            parameter.requires_grad_(source.requires_grad)
        if not layer.up.weight.is_meta:
            layer.draw(torch.Generator().manual_seed(seed))
        return layer.train(dense.training)


def _checked(dense, rank):
    if type(rank) is not int or not 1 <= rank <= min(dense.weight.shape):
        raise ValueError(f"rank={rank!r} is not from 1 to {min(dense.weight.shape)}")
    return rank


def _weighted(dense, metric):
    if metric is None:
        return {}
    second, mean = metric.second[0], metric.mean[0]
    centred = second if getattr(dense, "bias", None) is None else second - torch.outer(mean, mean)
    return {"second_moment": centred, "output_weights": metric.output_weights}


class PairLinear(_Pair):
    dense_type = nn.Linear

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, rank):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        with torch.random.fork_rng([]):
            self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            self.up = nn.Linear(rank, out_features, bias, device=device, dtype=dtype)

    @staticmethod
    def sizes(dense):
        return dense.in_features, dense.out_features, dense.bias is not None

    @property
    def weight(self):
        return self.up.weight @ self.down.weight

    @property
    def bias(self):
        return self.up.bias

    def write(self, left, right):
        self.up.weight.copy_(left)
        self.down.weight.copy_(right)

    def draw(self, generator):
        with torch.no_grad():
            self.down.weight.normal_(0, self.in_features**-0.5, generator=generator)
            self.up.weight.normal_(0, (3 * self.rank) ** -0.5, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5, generator=generator)

    def to_dense(self):
        where = {"device": self.up.weight.device, "dtype": self.up.weight.dtype}
        with torch.random.fork_rng([]):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, **where)
        dense.weight.requires_grad_(self.up.weight.requires_grad)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.requires_grad_(self.bias.requires_grad)
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    @classmethod
    def cost(cls, dense, calls, *, rank):
        weights = _checked(dense, rank) * (dense.in_features + dense.out_features)
        rows = sum(torch.Size(call.input[:-1]).numel() for call in calls)
        return Cost(weights + (0 if dense.bias is None else dense.out_features), rows * weights)


class PairEmbedding(_Pair):
    dense_type = nn.Embedding

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None, *, rank):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        with torch.random.fork_rng([]):
            self.down = nn.Embedding(num_embeddings, rank, device=device, dtype=dtype)
            self.up = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)

    @staticmethod
    def sizes(dense):
        return dense.num_embeddings, dense.embedding_dim

    @property
    def weight(self):
        return self.down.weight @ self.up.weight.T

    @weight.setter
    def weight(self, table):  # noqa: ARG002
        raise ValueError("the weight is a product")

    def write(self, left, right):
        self.down.weight.copy_(left)
        self.up.weight.copy_(right.T)

    def draw(self, generator):
        with torch.no_grad():
            self.down.weight.normal_(generator=generator)
            self.up.weight.normal_(0, self.rank**-0.5, generator=generator)

    def to_dense(self):
        with torch.random.fork_rng([]):
            dense = nn.Embedding(self.num_embeddings, self.embedding_dim, dtype=self.up.weight.dtype)
        dense = dense.to(self.up.weight.device)
        dense.weight.requires_grad_(self.up.weight.requires_grad)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        return dense.train(self.training)

    @classmethod
    def cost(cls, dense, calls, *, rank):
        weights = _checked(dense, rank) * (dense.num_embeddings + dense.embedding_dim)
        looked_up = sum(torch.Size(call.input).numel() for call in calls)
        return Cost(weights, looked_up * rank * dense.embedding_dim)
