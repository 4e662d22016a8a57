"""Is what `__all__` says what is visible, and is importing cheap?"""

import subprocess
import sys
import types

import pytest

import rankfold
import rankfold.testing


@pytest.mark.parametrize(
    "room",
    [rankfold, rankfold.decompose, rankfold.ranks, rankfold.layers, rankfold.train, rankfold.testing],
    ids=lambda m: m.__name__,
)
def test_all_is_what_is_visible(room):
    visible = {
        name
        for name, value in vars(room).items()
        if not name.startswith("_") and (name in room.__all__ or not isinstance(value, types.ModuleType))
    }
    assert visible == set(room.__all__)
    assert list(room.__all__) == sorted(room.__all__)


def test_the_front_door_is_small():
    assert len(rankfold.__all__) <= 25


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
