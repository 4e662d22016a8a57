"""Do the checks of arguments let through what is allowed, and say what is?"""

import math

import numpy as np
import pytest
import torch

import rankfold as rf
from rankfold._common import is_whole, near, one_of, real, some, whole
from rankfold.errors import PlanError, RankfoldError


@pytest.mark.parametrize("value", [2, 7, np.int64(2), np.uint8(3)])
def test_whole_numbers_come_back_as_ints(value):
    assert type(whole("n", value, 2)) is int
    assert whole("n", value, 2) == value


@pytest.mark.parametrize("value", [1, 2.0, True, np.bool_(True), "2", None, math.nan, -3, torch.tensor(2)])
def test_other_values_are_no_whole_numbers(value):
    with pytest.raises(PlanError, match=r"^n must be a whole number >= 2, got .*: the first is dense$"):
        whole("n", value, 2, error=PlanError, why=": the first is dense")


INTERVALS = [
    ({}, [0, 0.5, 1e300, np.float32(0.5), np.int64(3)], [-1e-9, math.inf], ">= 0"),
    ({"ends": "()"}, [1e-300, 3], [0, math.inf, -1], "> 0"),
    ({"ends": "(]"}, [1e-300, math.inf], [0, -math.inf], "> 0"),
    ({"most": 1, "ends": "(]"}, [1e-9, 1], [0, 1.0000001], "with 0 < x <= 1"),
    ({"most": 1}, [0, 0.999], [1, -0.1], "with 0 <= x < 1"),
    ({"most": 1, "ends": "[]"}, [0, 1], [1.1, -0.1], "with 0 <= x <= 1"),
    ({"least": 1}, [1, 9.5], [0.99], ">= 1"),
]


@pytest.mark.parametrize(("interval", "inside", "outside", "said"), INTERVALS)
def test_real_numbers_lie_in_their_interval(interval, inside, outside, said):
    for value in inside:
        assert type(real("x", value, **interval)) is float
        assert real("x", value, **interval) == value
    for value in [*outside, math.nan, True, "1", None, 1j]:
        with pytest.raises(RankfoldError) as caught:
            real("x", value, **interval)
        assert str(caught.value) == f"x must be a number {said}, got {value!r}"


def test_any_finite_number():
    assert real("x", -3, -math.inf, ends="()") == -3
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(RankfoldError, match="^x must be a finite number, got"):
            real("x", value, -math.inf, ends="()")


def test_names_and_what_was_meant():
    known = {"cosine": 1, "constant": 2}
    assert one_of("schedule", "cosine", known) == "cosine"
    for value, said in [
        ("cosin", "'cosin': did you mean 'cosine'?"),
        ("zzz", "'zzz'"),
        (3, "3"),
        (None, "None"),
        ([], "[]"),
    ]:
        with pytest.raises(PlanError) as caught:
            one_of("schedule", value, known, other="a function", error=PlanError)
        assert str(caught.value) == f"schedule must be 'cosine', 'constant' or a function, got {said}"


def test_a_list_of_names_says_how_many_are_left_out():
    names = list("abcdefg")
    assert some(names[:5]) == "a, b, c, d, e"
    assert some(names) == "a, b, c, d, e and 2 more"
    assert some([]) == ""


def test_numbers_of_numpy_are_stored_as_those_of_python():
    assert is_whole(np.int64(3), 3)
    assert not is_whole(np.int64(3), 4)
    size = np.int64(4)
    shapes = rf.layers.TTLinear(12, 12, rank=2, in_shape=(3, size), out_shape=(size, 3)).options
    assert {type(n) for shape in (shapes["in_shape"], shapes["out_shape"]) for n in shape} == {int}


def test_the_nearest_names():
    names = {"features.0", "features.3", "head"}
    assert near("haed", names) == ": did you mean 'head'?"
    assert near("*res*", names) == ": did you mean 'features.0' or 'features.3'?"
    assert near("zzz", []) == ""
