"""Does a TT-embedding compute rows without its table: each index once, by any order of work, to the dense gradients?"""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankfold.layers import Call, TTEmbedding
from rankfold.layers.tensor._tt_order import Chain
from rankfold.layers.tensor._tt_rows import ROWS, RowSchedule, bucket_of, schedule_rows, table_rows

F64 = torch.float64
SHAPES = {  # rows, dim, in_shape, out_shape: exact, padded, one mode of one, as in a large table
    "two": (12, 6, (3, 4), (2, 3)),
    "padded": (23, 7, (3, 2, 4), (2, 2, 2)),
    "ones": (30, 8, (5, 1, 6), (2, 4, 1)),
    "four": (120, 24, (2, 5, 3, 4), (2, 2, 3, 2)),
}


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation returns, in the backward pass too."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(leaf.numel() for leaf in tree_leaves(output) if torch.is_tensor(leaf))])
        return output


@pytest.mark.parametrize("case", SHAPES)
@given(rank=st.integers(1, 5), repeats=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_rows_and_gradients_are_the_tables_duplicates_included(case, rank, repeats, seed):
    rows, dim, in_shape, out_shape = SHAPES[case]
    padding = seed % rows if seed % 2 else None
    chain = TTEmbedding._form_of(nn.Embedding(rows, dim), in_shape=in_shape, out_shape=out_shape)
    layer = TTEmbedding(
        rows, dim, padding, dtype=F64, rank=min(rank, chain.full_rank()), in_shape=in_shape, out_shape=out_shape
    )
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(rows, (repeats, 3), generator=generator)
    weights = torch.randn(repeats, 3, dim, dtype=F64, generator=generator)
    output = layer(index)
    expected = nn.functional.embedding(index, layer.weight, padding)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad((output * weights).sum(), list(layer.cores))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), list(layer.cores)))


@pytest.mark.parametrize("case", SHAPES)
def test_every_order_of_work_gives_the_same_rows(case):
    rows, dim, in_shape, out_shape = SHAPES[case]
    layer = TTEmbedding(rows, dim, dtype=F64, rank=3, in_shape=in_shape, out_shape=out_shape)
    index, table = torch.randint(rows, (50,)), layer.weight
    order = len(in_shape)
    for cuts in itertools.product([False, True], repeat=order - 1):
        bonds = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), order]
        groups = tuple(itertools.pairwise(bonds))
        for from_left in (True, False):
            merges = tuple(layer._chain.merge(*group).order for group in groups)
            schedule = RowSchedule(groups, from_left, 0, 0, 0.0, merges)
            found = table_rows(list(layer.cores), in_shape, index, schedule)[:, :dim]
            torch.testing.assert_close(found, table[index])


def test_no_tensor_is_near_the_size_of_the_table():
    layer = TTEmbedding(1_000_000, 128, rank=16)
    with Largest() as largest:
        layer(torch.randint(1_000_000, (4096,))).sum().backward()
    assert largest.entries <= 16 * 4096 * 128 / 4
    assert all(core.grad.any() for core in layer.cores)


def test_a_small_table_is_not_built_either():
    layer = TTEmbedding(64, 4096, rank=2)
    with Largest() as largest:
        layer(torch.zeros(1000, dtype=torch.long)[:4])
    assert largest.entries < 64 * 4096


def test_cores_are_merged_while_they_have_fewer_slices_than_rows():
    chain = Chain((4, 4, 4, 4), (20, 20, 20, 20), (1, 16, 16, 16, 1))
    for rows in (1, 30, 400, 500, 10_000, 10**6):
        schedule = schedule_rows(chain, rows)
        assert [group[0] for group in schedule.groups[1:]] == [group[1] for group in schedule.groups[:-1]]
        assert (schedule.groups[0][0], schedule.groups[-1][1]) == (0, 4)
        assert len(schedule.groups) > 1
        for start, stop in schedule.groups:
            assert stop - start == 1 or math.prod(chain.in_shape[start:stop]) <= rows
    assert len(schedule_rows(chain, 1).groups) == 4
    assert len(schedule_rows(chain, 10_000).groups) == 2
    assert [ROWS[bucket_of(rows)] for rows in (0, 1, 9, 4096, 10**6)] == [1, 1, 64, 4096, 32768]


def test_scheduling_a_long_train_is_quick_work():
    chain = Chain((1,) * 16 + (2,) * 4, (2,) * 20, (1, *(2,) * 19, 1))
    assert len(schedule_rows(chain, 4096).groups) == 2


def test_the_schedule_is_the_predicted_cost():
    dense, layer = nn.Embedding(10_000, 64), TTEmbedding(10_000, 64, rank=8)
    call = Call((32, 50), (32, 50, 64))
    assert TTEmbedding.cost(dense, [call], rank=8).macs == layer.schedule(1600).macs(1600)


@pytest.mark.parametrize("index", [-1, 20, 24])
def test_one_index_out_of_range_is_refused_too(index):
    layer = TTEmbedding(20, 6, rank=2, in_shape=(5, 5), out_shape=(2, 3))  # padded to 25 rows
    with pytest.raises(IndexError, match="20 rows"):
        layer(torch.tensor(index))


def test_no_index_gives_no_row():
    layer = TTEmbedding(20, 6, rank=2)
    assert layer(torch.empty(3, 0, dtype=torch.long)).shape == (3, 0, 6)


def test_a_program_takes_any_number_of_indices():
    layer = TTEmbedding(1000, 16, padding_idx=3, rank=4).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            layer, (torch.arange(8),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
        ).module()
    for index in (torch.randint(1000, (31,)), torch.tensor([3, 3])):
        torch.testing.assert_close(program(index), layer(index))
