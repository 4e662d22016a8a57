"""The rows of the benchmark of tensor layers: who computes what, with which factors, on which input."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import _handwritten as hand
import _peers as peers
import torch
from _race import Contestant
from torch import Tensor, nn

import rankfold as rf


@dataclass(frozen=True)
class Entry:
    """An order of contraction: a contestant, its multiply-adds if counted, and the order it is a refinement of."""

    contestant: Contestant
    macs: int = 0
    parent: str = ""


class ByHand(nn.Module):
    """A contraction written by hand, called as a module like every other contestant."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@dataclass(frozen=True)
class Case:
    """A row of the table: how to make its contestants.

    Attributes:
        name: of the row.
        x: the input.
        dense: the dense layer.
        ours: Rankfold's layer.
        rivals: the other libraries' layers.
        orders: all contractions by hand, for inference or training.
        searched_as: the row whose search of orders this one shares, if not its own.
    """

    name: str
    x: Tensor
    dense: nn.Module
    ours: nn.Module
    rivals: dict[str, nn.Module]
    orders: Callable[[bool], Iterator[Entry]]
    searched_as: str = ""


def randn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def tt_cores(out_shape: Sequence[int], in_shape: Sequence[int], rank: int) -> list[Tensor]:
    """Return cores `(r, out, in, r')` whose product keeps the variance of its input."""
    bonds = [1]
    for k in range(1, len(in_shape)):
        left = torch.Size(out_shape[:k]).numel() * torch.Size(in_shape[:k]).numel()
        right = torch.Size(out_shape[k:]).numel() * torch.Size(in_shape[k:]).numel()
        bonds.append(min(rank, left, right))
    sizes = zip(bonds, out_shape, in_shape, [*bonds[1:], 1], strict=True)
    return [randn(r, m, n, after, scale=(r * n) ** -0.5, seed=k) for k, (r, m, n, after) in enumerate(sizes)]


@functools.lru_cache(maxsize=1)
def dense_linear(cores: tuple[Tensor, ...]) -> nn.Linear:
    """Return the dense layer of a train; kept while the batch sizes of one train follow each other."""
    weight = cores[0].permute(2, 1, 0, 3).flatten(2)  # in, out, r
    for core in cores[1:]:
        product = torch.tensordot(weight, core, dims=([2], [0]))  # in, out, out', in', r'
        weight = product.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    with torch.no_grad():
        layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.squeeze(2).T.contiguous())
    return layer


def fill(layer: nn.Module, values: Sequence[Tensor]) -> nn.Module:
    """Copy values into the parameters of a layer, in their order."""
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(value.reshape(parameter.shape))
    return layer


def trainable(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value.clone().requires_grad_() for value in values)


def linear_cases() -> Iterator[Case]:
    eights = (8, 8, 8, 8)
    fc6 = ((4,) * 6, (2, 7, 8, 8, 7, 4))
    for name, out_shape, in_shape, ranks, batches in (
        ("4096x4096 TT 8^4", eights, eights, (8, 16, 32), (1, 32, 1024)),
        ("fc6 25088x4096 TT", *fc6, (1, 2, 4), (1, 32, 128)),
    ):
        for rank in ranks:
            cores = tuple(tt_cores(out_shape, in_shape, rank))
            for batch in batches:
                yield linear_case(f"{name} rank {rank}, batch {batch}", cores, batch, rank)


def linear_case(name: str, cores: tuple[Tensor, ...], batch: int, rank: int) -> Case:
    out_shape, in_shape = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
    dense = dense_linear(cores)
    ours = rf.layers.TTLinear(
        dense.in_features, dense.out_features, bias=False, rank=rank, in_shape=in_shape, out_shape=out_shape
    )
    weights = trainable(cores)

    def entry(order: hand.Order, parent: str = "") -> Entry:
        run = functools.partial(hand.tt_linear, cores=weights, order=order)
        return Entry(Contestant(str(order), ByHand(run), weights), hand.tt_macs(order, cores, batch), parent)

    def orders(training: bool) -> Iterator[Entry]:
        for order in hand.tt_orders(cores, batch):
            yield entry(order)
            for part in hand.chunked(order, batch, training):
                yield entry(part, str(order))

    return Case(name, randn(batch, dense.in_features), dense, fill(ours, cores), peers.tt_linear(cores), orders)


CONVS = (  # channels, side, ranks of CP, Tucker-2 and spatial SVD at a fourth of the multiply-adds
    (256, 28, 288, 96, 96),
    (64, 56, 64, 24, 24),
)
BATCH = 8


def conv_factors(form: str, channels: int, rank: int) -> dict[str, Tensor]:
    outer = {"down": randn(rank, channels, scale=channels**-0.5), "up": randn(channels, rank, scale=rank**-0.5, seed=1)}
    if form == "cp":
        return {
            "down": outer["down"],
            "vertical": randn(rank, 3, scale=3**-0.5, seed=2),
            "horizontal": randn(rank, 3, scale=3**-0.5, seed=3),
            "up": outer["up"],
        }
    if form == "tucker":
        return {**outer, "core": randn(rank, rank, 3, 3, scale=(9 * rank) ** -0.5, seed=2)}
    return {
        "first": randn(rank, channels, 3, 1, scale=(3 * channels) ** -0.5),
        "second": randn(channels, rank, 1, 3, scale=(3 * rank) ** -0.5, seed=1),
    }


def our_conv(form: str, channels: int, f: dict[str, Tensor]) -> nn.Module:
    size, options = (channels, channels, 3), {"padding": 1, "bias": False}
    if form == "cp":
        layer = rf.layers.CPConv2d(*size, **options, rank=len(f["down"]))
        kernel = f["vertical"][:, :, None] * f["horizontal"][:, None, :]
        return fill(layer, [f["down"], kernel, f["up"]])
    if form == "cp, separable":
        layer = rf.layers.CPConv2d(*size, **options, rank=len(f["down"]), separable=True)
        return fill(layer, [f["down"], f["vertical"], f["horizontal"], f["up"]])
    if form == "tucker":
        layer = rf.layers.TuckerConv2d(*size, **options, rank=tuple(f["core"].shape[:2]))
        return fill(layer, [f["down"], f["core"], f["up"]])
    layer = rf.layers.LowRankConv2d(*size, **options, rank=len(f["first"]), split="spatial")
    return fill(layer, [f["first"], f["second"]])


RIVALS: dict[str, Callable[[dict[str, Tensor]], dict[str, nn.Module]]] = {
    "cp": peers.cp_conv,
    "tucker": peers.tucker_conv,
}


def conv_cases() -> Iterator[Case]:
    forms = {"CP": "cp", "CP separable": "cp, separable", "Tucker-2": "tucker", "spatial SVD": "spatial"}
    for (channels, side, cp, tucker, spatial), (title, ours), layout in itertools.product(
        CONVS, forms.items(), hand.LAYOUTS
    ):
        form = ours.partition(",")[0]
        rank = {"cp": cp, "tucker": tucker, "spatial": spatial}[form]
        f = conv_factors(form, channels, rank)
        name = f"conv {channels} 3x3 {side}x{side} {title} rank {rank}, batch {BATCH}, {layout}"
        yield conv_case(name, form, f, our_conv(ours, channels, f), hand.LAYOUTS[layout])


def conv_case(name: str, form: str, f: dict[str, Tensor], ours: nn.Module, memory: torch.memory_format) -> Case:
    kernel = hand.KERNELS[form](f)
    channels, side = kernel.shape[0], next(side for width, side, *_ in CONVS if width == kernel.shape[0])
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    fill(dense, [kernel])
    weights = dict(zip(f, trainable(tuple(f.values())), strict=True))

    def orders(training: bool) -> Iterator[Entry]:
        del training
        for title, run in hand.conv_orders(form, weights, BATCH):
            yield Entry(Contestant(title, ByHand(run), tuple(weights.values())))

    x = randn(BATCH, channels, side, side).to(memory_format=memory)
    rivals = {
        title: layer.to(memory_format=memory) for title, layer in (RIVALS[form](f) if form in RIVALS else {}).items()
    }
    models = [layer.to(memory_format=memory) for layer in (dense, ours)]
    return Case(name, x, *models, rivals, orders, name.replace(" separable", ""))


TABLE = {"rows": (100, 100, 100), "width": (4, 4, 8), "rank": 16, "indices": 4096}


def table_cases() -> Iterator[Case]:
    cores = tt_cores(TABLE["width"], TABLE["rows"], TABLE["rank"])
    scaled = [core * core.shape[2] ** 0.5 for core in cores]
    rows, width = (torch.Size(TABLE[key]).numel() for key in ("rows", "width"))
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(rows, (TABLE["indices"],), generator=generator)
    words = (rows ** torch.rand(TABLE["indices"], generator=generator)).long().clamp(max=rows - 1)
    dense = nn.Embedding(rows, width, _weight=dense_linear(tuple(scaled)).weight.detach().T.contiguous())
    ours = rf.layers.TTEmbedding(rows, width, rank=TABLE["rank"], in_shape=TABLE["rows"], out_shape=TABLE["width"])
    weights = trainable(scaled)

    def orders(training: bool) -> Iterator[Entry]:
        del training
        for title, run in hand.tt_table_orders(weights):
            yield Entry(Contestant(title, ByHand(run), weights))

    fill(ours, scaled)
    rivals = peers.tt_embedding(scaled)
    name = f"table 1Mx128 TT rank {TABLE['rank']}, {TABLE['indices']} indices"
    for kind, indices in (("uniform", uniform), ("Zipf", words)):
        yield Case(f"{name}, {kind}", indices, dense, ours, rivals, orders)


def cases(only: str) -> Iterator[Case]:
    """Yield the rows in whose name a regular expression is found."""
    for case in itertools.chain(linear_cases(), conv_cases(), table_cases()):
        if re.search(only, case.name):
            yield case
