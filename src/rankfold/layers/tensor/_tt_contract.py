"""A tensor train times a batch of vectors, carried out in a scheduled order.

The state of a sweep is a batch of matrices whose middle axis is contracted with the next core, so that every step is
a view and one matrix product. From the left, a merged group takes

    (rows M_1..M_i, r_i n, N_j..N_d) -> (rows M_1..M_i, m r_j, N_j..N_d),

from the right the same with the roles of rows and columns exchanged. Rows are taken in chunks to
bound the size of intermediates; a compiled or exported program, where the number of rows may be symbolic, takes them
all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rankfold.layers.tensor._tt_order import Sweep

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def core_list(layer: nn.Module, count: int) -> list[Tensor]:
    """Return the `count` cores of a layer, bypassing `nn.Module`, whose look-ups cost as much as a small product."""
    held: Any = layer._modules["cores"]
    plain = held._parameters
    return list(plain.values()) if len(plain) == count else list(held)  # a parametrised core is no parameter


def merge(cores: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Return neighbouring cores as one core (r, out, in, r'), by products in an order from `Chain.merge`."""
    (core,) = _joined(cores, order)
    return core


def _joined(cores: Sequence[Tensor], order: Sequence[int]) -> Sequence[Tensor]:
    """Return what remains of the cores after some products."""
    parts = list(cores)
    for at in order:
        product = _product(parts[at], parts[at + 1])
        before, m, n, p, q, after = product.shape
        parts[at : at + 2] = [product.permute(0, 1, 3, 2, 4, 5).reshape(before, m * p, n * q, after)]
    return parts


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return two parts multiplied over their bond: r, m, n, p, q, r'."""
    before, m, n, bond = left.shape
    _, p, q, after = right.shape
    return torch.mm(left.reshape(-1, bond), right.reshape(bond, -1)).reshape(before, m, n, p, q, after)


def matrices_of(cores: Sequence[Tensor], sweep: Sweep) -> list[Tensor]:
    """Return each group as the matrix that multiplies the state, in the order of use and the dtype of autocast."""
    found, from_left = [], sweep.from_left
    for start, stop, order, _, rows, inner, _ in sweep.turns:
        if not order:
            matrix = cores[start].permute(1, 3, 0, 2) if from_left else cores[start]  # m r', r n or r m, n r'
        else:  # the last product is put in the order of the matrix directly
            product = _product(*_joined(cores[start:stop], order[:-1]))
            matrix = product.permute(1, 3, 5, 0, 2, 4) if from_left else product.permute(0, 1, 3, 2, 4, 5)
        found.append(matrix.reshape(rows, inner))
    kind = found[0].device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # before the matrices are spread over a batch
        return [matrix.to(torch.get_autocast_dtype(kind)) for matrix in found]
    return found


def contract(state: Tensor, cores: Sequence[Tensor], sweep: Sweep) -> Tensor:
    """Multiply a train by a batch of vectors, or of matrices whose columns are carried along.

    Args:
        state: (rows, r_0 times product of in, columns); from the right r_0 must be 1.
        cores: (r, out_k, in_k, r'), the last r' is 1.
        sweep: the order, from `schedule_sweep`.

    Returns:
        (rows, product of out, columns).
    """

    def run(part: Tensor, *matrices: Tensor) -> Tensor:
        return sweep_state(part, matrices, sweep)

    return in_chunks(run, state, matrices_of(cores, sweep), chunk=sweep.chunk, recompute=sweep.recompute)


def in_chunks(
    run: Callable[..., Tensor], rows: Tensor, shared: Sequence[Tensor], *, chunk: int, recompute: bool
) -> Tensor:
    """Return `run(part, *shared)` over parts of `chunk` rows (0: all at once), recomputed in backward on request."""
    if recompute and torch.is_grad_enabled() and not is_exporting():
        forward = run

        def run(part: Tensor, *shared: Tensor) -> Tensor:
            result: Tensor = checkpoint(forward, part, *shared, use_reentrant=False, preserve_rng_state=False)
            return result

    if not chunk or torch.compiler.is_compiling() or rows.shape[0] <= chunk:
        return run(rows, *shared)
    return torch.cat([run(part, *shared) for part in torch.split(rows, chunk)])


def sweep_state(state: Tensor, matrices: Sequence[Tensor], sweep: Sweep) -> Tensor:
    """Contract the matrices of a sweep with a state (rows, r_0 times product of in).

    Each row may carry columns along, as a third axis. The result is (rows, product of out), columns behind it.
    """
    count, carried = state.shape[0], state.shape[2:]
    columns = carried[0] if carried else 1
    compiling = torch.compiler.is_compiling()
    for matrix, (_, _, _, batch, rows, inner, width) in zip(matrices, sweep.turns, strict=True):
        out = batch * rows * width
        width *= columns
        batch *= count
        if width == 1:
            state = functional.linear(state.reshape(-1, inner), matrix)
        elif compiling:
            state = matrix @ state.reshape(-1, inner, width)
        elif batch == 1:
            state = torch.mm(matrix, state.reshape(inner, width))
        else:  # matmul would copy the state to fold it
            state = torch.bmm(matrix.expand(batch, rows, inner), state.reshape(batch, inner, width))
    return state.reshape(-1, out, *carried)
