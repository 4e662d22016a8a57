"""Does one table know the dense layers, and does every other file ask it?"""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold import layers
from rankfold.layers import DENSE_TYPES, TABLE, along_outputs, dense_type_of, output_size, row_size

PACKAGE = Path(rf.__file__).parent
KINDS = {row.kind.__name__ for row in DENSE_TYPES if isinstance(row.kind, type)}
STOCK = [row for row in DENSE_TYPES if row.stock]
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_dense.py"]


def kinds_in(node):
    """Which dense types an expression names itself, not inside of calls and the like."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nn":
        return {node.attr} & KINDS
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return set().union(*map(kinds_in, node.elts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return kinds_in(node.left) | kinds_in(node.right)
    return set().union(*map(kinds_in, filter(None, node.keys))) if isinstance(node, ast.Dict) else set()


def lists_of_types(source):
    return [found for node in ast.walk(ast.parse(source)) if len(found := kinds_in(node)) > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_lists_dense_types(path):
    assert not lists_of_types(path.read_text())


def test_a_list_of_dense_types_is_seen():
    for source in (
        "A = (nn.Conv1d, nn.Linear)",
        "isinstance(x, nn.Conv2d | nn.Conv3d)",
        "{nn.Linear: 1, nn.Conv1d: 2}",
    ):
        assert lists_of_types(source)


def test_every_layer_factorises_a_stock_type_of_the_table():
    assert {kind for kind, _ in TABLE} == {row.kind for row in STOCK}


@pytest.mark.parametrize("row", DENSE_TYPES, ids=lambda row: row.name)
def test_a_row_is_whole(row):
    assert (row.rows == "none") or row.fan_in is not None
    assert bool(row.rows == "patches") == (row.convolve is not None)
    assert not row.stock or None not in (row.fan_in, row.macs)
    assert row.stock or row.refused or row.twin in {other.kind for other in STOCK}


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_values_along_the_outputs_scale_the_outputs(kind, groups):
    layer = kind(4, 6, 3, groups=groups, bias=False)
    axes, scale = dense_type_of(layer).axes, torch.rand(6) + 1
    x = torch.randn(2, 4, *(5,) * axes)
    expected = layer(x) * scale.reshape(-1, *(1,) * axes)
    with torch.no_grad():
        layer.weight *= along_outputs(layer, scale)
    torch.testing.assert_close(layer(x), expected)


def test_sizes_are_those_of_the_layer_that_is_replaced():
    dense = nn.Conv2d(8, 12, 3, groups=2)
    small = layers.LowRankConv2d.from_dense(dense, rank=2)
    for layer in (dense, small):
        assert (row_size(layer), output_size(layer)) == ((2, 36), 12)
    for layer in (nn.Embedding(5, 3), nn.ConvTranspose2d(4, 4, 3), nn.ReLU()):
        assert (row_size(layer), output_size(layer)) == (None, 0)


def test_subclasses_are_known_only_where_asked_for():
    class MyLinear(nn.Linear):
        pass

    assert dense_type_of(MyLinear(2, 2)) is None
    assert dense_type_of(MyLinear(2, 2), subclasses=True).kind is nn.Linear
