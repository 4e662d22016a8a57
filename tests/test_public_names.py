"""Is what `__all__` says what is visible, and is importing cheap?"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest

import rankfold
import rankfold.testing
from rankfold.planning import (
    METRICS,
    OBJECTIVES,
    QUANTITIES,
    RULES,
    MethodName,
    MetricName,
    ObjectiveName,
    Quantity,
    RuleName,
    plannable,
)

SOURCE = Path(rankfold.__file__).parent
PUBLIC = [rankfold.decompose, rankfold.ranks, rankfold.latency, rankfold.layers, rankfold.train, rankfold.testing]


@pytest.mark.parametrize("room", [rankfold, *PUBLIC], ids=lambda room: room.__name__)
def test_all_is_what_is_visible(room):
    visible = {
        name
        for name, value in vars(room).items()
        if not name.startswith("_") and (name in room.__all__ or not isinstance(value, types.ModuleType))
    }
    assert visible == set(room.__all__)
    assert list(room.__all__) == sorted(room.__all__)


def test_the_front_door_is_small():
    assert len(rankfold.__all__) <= 27


def test_completion_offers_the_public_names_only():
    assert set(dir(rankfold)) == {*rankfold.__all__, "__doc__", "__version__"}


def test_the_version_is_that_of_the_package():
    assert rankfold.__version__ == importlib.metadata.version("rankfold")


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (MethodName, set(plannable())),
        (RuleName, set(RULES)),
        (MetricName, {"auto", *METRICS}),
        (ObjectiveName, {"auto", *OBJECTIVES}),
        (Quantity, set(QUANTITIES)),
    ],
)
def test_names_that_an_editor_completes_are_those_of_the_tables(names, known):
    assert set(get_args(names)) == known


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_function_has_more_than_twelve_parameters(path):
    """Constructors of layers have those of their dense twins, and more."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            assert len(names) <= 12, f"{node.name} has {len(names)}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_an_argument_is_described_where_it_is(path):
    """Help that pops up in an editor must say what a thing is, not where it is said."""
    assert not re.findall(r"^ +\w+: .*\bas in `.*$", path.read_text(), re.MULTILINE)


def test_files_are_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py"))
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] < 150


def test_every_public_name_has_a_docstring():
    for name in rankfold.__all__:
        value = getattr(rankfold, name)
        if callable(value):
            assert value.__doc__, name


def test_import_pulls_in_nothing_optional():
    code = (
        "import sys, rankfold;"
        "print([m for m in ('matplotlib', 'onnx', 'onnxruntime', 'torchvision', 'transformers', 'sklearn') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
