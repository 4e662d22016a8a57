"""A tensor train times a batch of vectors, carried out in a planned order.

The state of a sweep is a batch of matrices whose middle axis is what the next core contracts, so that every
step is a view and one matrix product. From the left, a merged group takes

    (rows M_1..M_i, r_i n, N_j..N_d) -> (rows M_1..M_i, m r_j, N_j..N_d),

from the right the same with the roles of rows and columns exchanged. Rows are taken in chunks, so that no
intermediate exceeds a bound; in a compiled or exported program, where the number of rows may be a symbol, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rankfold.layers._tt_order import Sweep

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def core_list(layer: nn.Module, count: int) -> list[Tensor]:
    """Return the `count` cores of a layer; going through `nn.Module` for each takes as long as a small product."""
    held: Any = layer._modules["cores"]
    plain = held._parameters
    return list(plain.values()) if len(plain) == count else list(held)  # a parametrised core is no parameter


def merge(cores: Sequence[Tensor]) -> Tensor:
    """Return neighbouring cores as one core (r, out, in, r'), grown from the side with the smaller bond."""
    if len(cores) == 1:
        return cores[0]
    if cores[0].shape[0] <= cores[-1].shape[3]:
        return _join(merge(cores[:-1]), cores[-1])
    return _join(cores[0], merge(cores[1:]))


def _join(left: Tensor, right: Tensor) -> Tensor:
    before, m, n, bond = left.shape
    _, p, q, after = right.shape
    product = left.reshape(-1, bond) @ right.reshape(bond, -1)  # r m n, p q r'
    paired = product.reshape(before, m, n, p, q, after).permute(0, 1, 3, 2, 4, 5)  # r, m, p, n, q, r'
    return paired.reshape(before, m * p, n * q, after)


def merge_groups(cores: Sequence[Tensor], sweep: Sweep) -> list[Tensor]:
    """Return the merged core of each group of a sweep, in the dtype of autocast where it is on."""
    groups = [cores[start] if stop - start == 1 else merge(cores[start:stop]) for start, stop in sweep.groups]
    kind = groups[0].device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # before the matrices are spread over a batch
        return [group.to(torch.get_autocast_dtype(kind)) for group in groups]
    return groups


def contract(state: Tensor, cores: Sequence[Tensor], sweep: Sweep) -> Tensor:
    """Multiply a train with a batch of vectors, or of matrices whose columns are carried along.

    Args:
        state: (rows, r_0 times product of in, columns); from the right r_0 must be 1.
        cores: (r, out_k, in_k, r'), the last r' is 1.
        sweep: the order, from `plan_sweep`.

    Returns:
        (rows, product of out, columns).
    """
    groups = merge_groups(cores, sweep)

    def run(part: Tensor, *groups: Tensor) -> Tensor:
        return sweep_state(part, groups, sweep.from_left)

    return in_chunks(run, state, groups, chunk=sweep.chunk, recompute=sweep.recompute)


def in_chunks(
    run: Callable[..., Tensor], rows: Tensor, shared: Sequence[Tensor], *, chunk: int, recompute: bool
) -> Tensor:
    """Return `run(part, *shared)` of the rows, in parts of `chunk` (0: one), what it keeps recomputed in backward."""
    if recompute and torch.is_grad_enabled() and not is_exporting():
        forward = run

        def run(part: Tensor, *shared: Tensor) -> Tensor:
            result: Tensor = checkpoint(forward, part, *shared, use_reentrant=False, preserve_rng_state=False)
            return result

    if not chunk or torch.compiler.is_compiling() or rows.shape[0] <= chunk:
        return run(rows, *shared)
    return torch.cat([run(part, *shared) for part in torch.split(rows, chunk)])


def sweep_state(state: Tensor, groups: Sequence[Tensor], from_left: bool) -> Tensor:
    """Contract merged groups with a state (rows, r_0 times product of in) from one end to the other.

    Each row may carry columns along, as a third axis. The result is (rows, product of out), columns behind it.
    """
    columns = state.shape[2:]
    width = math.prod([*columns, *(group.shape[2] for group in groups)]) if from_left else math.prod(columns)
    out = 1
    for group in groups if from_left else reversed(groups):
        before, m, n, after = group.shape
        out *= m
        if from_left:
            width //= n
            matrix = group.permute(1, 3, 0, 2).reshape(m * after, before * n)
            state = _multiply(matrix, state, width)  # rows M, m r', N columns
        else:
            state = _multiply(group.reshape(before * m, n * after), state, width)  # rows N, r m, M columns
            width *= m
    return state.reshape(-1, out, *columns)


def _multiply(matrix: Tensor, state: Tensor, width: int) -> Tensor:
    """Multiply the state, seen as a batch of matrices of this width, with one matrix."""
    if width == 1:
        return functional.linear(state.reshape(-1, matrix.shape[1]), matrix)
    state = state.reshape(-1, matrix.shape[1], width)
    if torch.compiler.is_compiling():
        return matrix @ state
    if state.shape[0] == 1:
        return matrix @ state[0]
    return torch.bmm(matrix.expand(state.shape[0], -1, -1), state)  # matmul would copy the state to fold it
