"""Contractions written by hand with views and matrix products, and all the orders in which they can be carried out.

Nothing of Rankfold is used. An order is a value that says how; `orders` yields all of them, and timing decides:
  - tensor-train matrices: every grouping of neighbouring cores that are merged first (one group of all is the dense
    weight), from either end, the rows of the batch in front (a product per row) or behind (wide products, at the price
    of two transpositions), by `matmul` or by `bmm`, the batch whole or in chunks, and for training whether
    autograd keeps the intermediates of a chunk or computes them again;
  - convolutions: the chain or one convolution by the rebuilt kernel, kernels fused where they can be, pointwise
    convolutions as such or as matrix products, each in both memory layouts, the batch whole or image by image;
  - tensor-train tables: either end, two cores merged first or none, indices as they come or each distinct one once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNKS = (16, 64, 256)


@dataclass(frozen=True)
class Order:
    """An order of the contraction of a tensor-train matrix with rows."""

    groups: tuple[tuple[int, int], ...]
    from_left: bool = False
    rows_last: bool = False
    bmm: bool = False
    chunk: int = 0
    recompute: bool = False

    def __str__(self) -> str:
        """Say it in a few words."""
        groups = " ".join(f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in self.groups)
        parts = [f"cores [{groups}]"]
        if len(self.groups) > 1:
            parts += ["from the left" if self.from_left else "from the right"]
            parts += ["rows last"] * self.rows_last + ["bmm"] * self.bmm
        parts += [f"chunks of {self.chunk}"] * bool(self.chunk) + ["recomputed"] * self.recompute
        return ", ".join(parts)


def tt_orders(cores: Sequence[Tensor], rows: int) -> Iterator[Order]:
    """Yield every order, the batch whole."""
    count = len(cores)
    for cuts in itertools.product((False, True), repeat=count - 1):
        places = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), count]
        groups = tuple(itertools.pairwise(places))
        if len(groups) == 1:
            yield Order(groups)
            continue
        for from_left, rows_last, bmm in itertools.product((False, True), repeat=3):
            if rows > 1 or not rows_last:
                yield Order(groups, from_left, rows_last, bmm)


def chunked(order: Order, rows: int, training: bool) -> Iterator[Order]:
    """Yield an order with the batch in chunks of each size, and for training without keeping intermediates."""
    given = {field.name: getattr(order, field.name) for field in fields(order)}
    for chunk in (0, *(size for size in CHUNKS if size < rows)):
        for recompute in (False, True) if training else (False,):
            if chunk or recompute:
                yield Order(**{**given, "chunk": chunk, "recompute": recompute})


def tt_macs(order: Order, cores: Sequence[Tensor], rows: int) -> int:
    """Return the multiply-adds of an order, merging included."""
    merged = [_merged_size(cores[start:stop]) for start, stop in order.groups]
    macs = sum(cost for _, cost in merged)
    shapes = [shape for shape, _ in merged]
    outs, ins = [shape[1] for shape in shapes], [shape[2] for shape in shapes]
    for k, shape in enumerate(shapes):
        around = (outs[:k], ins[k + 1 :]) if order.from_left else (ins[:k], outs[k + 1 :])
        macs += rows * math.prod(shape) * math.prod(around[0]) * math.prod(around[1])
    return macs


def _merged_size(cores: Sequence[Tensor]) -> tuple[tuple[int, ...], int]:
    shape, macs = tuple(cores[0].shape), 0
    for core in cores[1:]:
        r, m, n, bond = shape
        _, p, q, after = core.shape
        macs += r * m * n * bond * p * q * after
        shape = (r, m * p, n * q, after)
    return shape, macs


def _merge(cores: Sequence[Tensor]) -> Tensor:
    """Merge neighbouring cores from the left."""
    left = cores[0]
    for core in cores[1:]:
        r, m, n, bond = left.shape
        _, p, q, after = core.shape
        product = (left.reshape(-1, bond) @ core.reshape(bond, -1)).reshape(r, m, n, p, q, after)
        left = product.transpose(2, 3).reshape(r, m * p, n * q, after)
    return left


def _matrices(cores: Sequence[Tensor], order: Order) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Return each group as the matrix that multiplies the state, in the order of use, and its shape as a core."""
    groups = [_merge(cores[start:stop]) for start, stop in order.groups]
    shapes = [tuple(group.shape) for group in groups]
    if order.from_left:
        return [group.permute(1, 3, 0, 2).flatten(2).flatten(0, 1) for group in groups], shapes
    return [group.flatten(2).flatten(0, 1) for group in reversed(groups)], shapes[::-1]


def _sweep(x: Tensor, matrices: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], order: Order) -> Tensor:
    """Multiply `(rows, in)` with all groups."""
    columns = x.shape[0] if order.rows_last else 1
    state = x.T.contiguous() if order.rows_last else x  # (in, rows) or (rows, in): only the last axis differs
    contracted = [(r * n if order.from_left else n * after) for r, _, n, after in shapes]
    open_axes = [n for _, _, n, _ in shapes] if order.from_left else [m for _, m, _, _ in shapes]
    for k, matrix in enumerate(matrices):
        free = math.prod(open_axes[k + 1 :]) if order.from_left else math.prod(open_axes[:k])
        width = free * columns
        state = state.reshape(-1, contracted[k], width)
        if width == 1:
            state = functional.linear(state.squeeze(2), matrix)
        elif state.shape[0] == 1:
            state = matrix @ state[0]
        elif order.bmm:
            state = torch.bmm(matrix.expand(state.shape[0], *matrix.shape), state)
        else:
            state = matrix @ state
    if order.rows_last:
        return state.reshape(-1, columns).T.contiguous()
    return state.reshape(x.shape[0], -1)


class _Recomputed(torch.autograd.Function):
    """A contraction that keeps only its input, and computes a chunk again where its gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order, *cores: Tensor) -> Tensor:
        ctx.save_for_backward(x, *cores)
        ctx.order = order
        return _plain(x, cores, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [core.detach().requires_grad_() for core in cores]
            matrices, shapes = _matrices(leaves, ctx.order)
        held = [matrix.detach().requires_grad_() for matrix in matrices]
        totals: list[Tensor] = []
        into = []
        size = ctx.order.chunk or x.shape[0]
        for part, upstream in zip(x.split(size), grad.split(size), strict=True):
            with torch.enable_grad():
                given = part.detach().requires_grad_()
                output = _sweep(given, held, shapes, ctx.order)
            first, *others = torch.autograd.grad(output, [given, *held], upstream)
            into.append(first)
            totals = [a.add_(b) for a, b in zip(totals, others, strict=True)] if totals else others
        grads = torch.autograd.grad(matrices, leaves, totals)
        return torch.cat(into) if len(into) > 1 else into[0], None, *grads


def _plain(x: Tensor, cores: Sequence[Tensor], order: Order) -> Tensor:
    matrices, shapes = _matrices(cores, order)
    parts = [_sweep(part, matrices, shapes, order) for part in x.split(order.chunk or x.shape[0])]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def tt_linear(x: Tensor, cores: Sequence[Tensor], order: Order) -> Tensor:
    """Multiply `(rows, in)` with a tensor train, cores `(r, out, in, r')`."""
    return _Recomputed.apply(x, order, *cores) if order.recompute else _plain(x, cores, order)


# Convolutions: 3x3, padding 1, no bias.

Kernels = Mapping[str, Tensor]


def _pointwise(x: Tensor, matrix: Tensor, as_product: bool) -> Tensor:
    if not as_product:
        return functional.conv2d(x, matrix[:, :, None, None])
    if x.is_contiguous(memory_format=torch.channels_last):
        return functional.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
    return (matrix @ x.flatten(2)).reshape(x.shape[0], -1, *x.shape[2:])


def cp_kernel(f: Kernels) -> Tensor:
    """Return the kernel (out, in, 3, 3)."""
    inner = f["down"][:, :, None] * (f["vertical"][:, :, None] * f["horizontal"][:, None, :]).reshape(-1, 1, 9)
    return (f["up"] @ inner.flatten(1)).reshape(f["up"].shape[0], -1, 3, 3)


def _cp_chain(x: Tensor, f: Kernels, *, fused: bool, as_product: bool) -> Tensor:
    x = _pointwise(x, f["down"], as_product)
    if fused:
        kernel = (f["vertical"][:, :, None] * f["horizontal"][:, None, :]).unsqueeze(1)
        x = functional.conv2d(x, kernel, padding=1, groups=len(kernel))
    else:
        x = functional.conv2d(x, f["vertical"][:, None, :, None], padding=(1, 0), groups=x.shape[1])
        x = functional.conv2d(x, f["horizontal"][:, None, None, :], padding=(0, 1), groups=x.shape[1])
    return _pointwise(x, f["up"], as_product)


def tucker_kernel(f: Kernels) -> Tensor:
    """Return the kernel (out, in, 3, 3)."""
    into = torch.matmul(f["core"].permute(0, 2, 3, 1), f["down"])  # r', 3, 3, in
    return (f["up"] @ into.flatten(1)).reshape(-1, 3, 3, into.shape[3]).permute(0, 3, 1, 2)


def _tucker_chain(x: Tensor, f: Kernels, *, as_product: bool, merge: str) -> Tensor:
    core = f["core"]
    if merge == "down":
        core = torch.matmul(core.permute(0, 2, 3, 1), f["down"]).permute(0, 3, 1, 2)
    elif merge == "up":
        core = (f["up"] @ core.flatten(1)).reshape(-1, *core.shape[1:])
    if merge != "down":
        x = _pointwise(x, f["down"], as_product)
    x = functional.conv2d(x, core, padding=1)
    return x if merge == "up" else _pointwise(x, f["up"], as_product)


def spatial_kernel(f: Kernels) -> Tensor:
    """Return the kernel (out, in, 3, 3) of `first` (r, in, 3, 1) and `second` (out, r, 1, 3)."""
    up = f["second"].squeeze(2).transpose(1, 2).flatten(0, 1)  # out 3, r
    product = (up @ f["first"].flatten(1)).reshape(f["second"].shape[0], 3, -1, 3)
    return product.permute(0, 2, 3, 1)  # out, in, vertical, horizontal


def _spatial_chain(x: Tensor, f: Kernels) -> Tensor:
    return functional.conv2d(functional.conv2d(x, f["first"], padding=(1, 0)), f["second"], padding=(0, 1))


KERNELS: dict[str, Callable[[Kernels], Tensor]] = {
    "cp": cp_kernel,
    "tucker": tucker_kernel,
    "spatial": spatial_kernel,
}
PRODUCTS = {"1x1 as convolution": False, "1x1 as product": True}
CHAINS: dict[str, dict[str, Callable[[Tensor, Kernels], Tensor]]] = {
    "cp": {
        f"chain, depthwise {name}, {pointwise}": lambda x, f, fused=fused, p=p: _cp_chain(
            x, f, fused=fused, as_product=p
        )
        for name, fused in (("3x3", True), ("3x1 and 1x3", False))
        for pointwise, p in PRODUCTS.items()
    },
    "tucker": {
        f"chain{name}, {pointwise}": lambda x, f, merge=merge, p=p: _tucker_chain(x, f, as_product=p, merge=merge)
        for name, merge in (("", ""), (" of two, first merged", "down"), (" of two, last merged", "up"))
        for pointwise, p in PRODUCTS.items()
    },
    "spatial": {"chain": _spatial_chain},
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def conv_orders(form: str, f: Kernels, batch: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield every way to convolve, by name; the output has the layout of the input."""
    ways = {**CHAINS[form], "rebuilt": lambda x, f: functional.conv2d(x, KERNELS[form](f).contiguous(), padding=1)}
    for (name, way), (layout, memory), images in itertools.product(ways.items(), LAYOUTS.items(), (batch, 1, 2)):
        if name == "rebuilt" and images < batch:
            continue

        def run(x: Tensor, way: Any = way, memory: torch.memory_format = memory, images: int = images) -> Tensor:
            given = (
                torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            )
            parts = [way(part.contiguous(memory_format=memory), f) for part in x.split(images)]
            y = torch.cat(parts) if len(parts) > 1 else parts[0]
            return y.contiguous(memory_format=given)

        chunks = f", {images} of {batch} images at a time" if images < batch else ""
        yield f"{name}, {layout}{chunks}", run


# Tables.


def tt_table_orders(cores: Sequence[Tensor]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield every way to look up rows in a tensor train, cores `(r, out, in, r')`, by name."""
    merges = {"": (), ", first two merged": (0,), ", last two merged": (len(cores) - 2,)}
    for (merged, at), from_left, distinct in itertools.product(merges.items(), (True, False), (False, True)):

        def run(
            indices: Tensor, at: tuple[int, ...] = at, from_left: bool = from_left, distinct: bool = distinct
        ) -> Tensor:
            parts = list(cores)
            for k in at:
                parts[k : k + 2] = [_merge(parts[k : k + 2])]
            if not distinct:
                return _lookup(indices, parts, from_left)
            found, places = torch.unique(indices, return_inverse=True)
            return functional.embedding(places, _lookup(found, parts, from_left))

        end = "from the left" if from_left else "from the right"
        yield f"{end}{merged}{', distinct indices' if distinct else ''}", run


def _lookup(indices: Tensor, cores: Sequence[Tensor], from_left: bool) -> Tensor:
    slices = []
    for core in reversed(cores):
        by_index = core.permute(2, 0, 1, 3).contiguous()
        slices.append(by_index.index_select(0, indices % core.shape[2]))  # indices, r, out, r'
        indices = indices // core.shape[2]
    slices.reverse()
    count = len(slices[0])
    if from_left:
        row = slices[0].flatten(1, 2)
        for part in slices[1:]:
            row = torch.bmm(row, part.flatten(2)).reshape(count, -1, part.shape[3])
        return row.flatten(1)
    row = slices[-1].flatten(2)
    for part in reversed(slices[:-1]):
        before, dim = part.shape[1:3]
        row = torch.bmm(part.flatten(1, 2), row).reshape(count, before, dim * row.shape[2])
    return row.flatten(1)
