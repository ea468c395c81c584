import math
from typing import Literal

import numpy as np
import pytest

from lightning_eff.arguments import (
    check_choice,
    check_count,
    check_flag,
    check_globs,
    check_number,
    check_text,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("value", ["1", True, None, NAN, INF, -INF, [1], 1j, 0, 1, -0.5, object()])
def test_numbers_that_are_none(value):
    with pytest.raises(ValueError, match=r"^x=.* is not allowed: it must be a number above 0 and below 1$"):
        check_number("x", value, above=0, below=1)


@pytest.mark.parametrize("value", [0.5, 1e-9, np.float32(0.5), np.float64(0.25)])
def test_numbers(value):
    check_number("x", value, above=0, below=1)
    check_number("x", None, above=0, optional=True)
    check_number("x", -3)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None, [1], 11])
def test_counts_that_are_none(value):
    with pytest.raises(ValueError, match=r"^x=.* is not allowed: it must be an integer from 1 to 10$"):
        check_count("x", value, most=10)


@pytest.mark.parametrize("value", [0, 1, None, "yes", "false", 1.0])
def test_flags_that_are_none(value):
    with pytest.raises(ValueError, match="True or False"):
        check_flag("x", value)
    check_flag("x", False)


@pytest.mark.parametrize("value", ["c", None, 1, ["a"], True])
def test_choices_that_are_none(value):
    with pytest.raises(ValueError, match=r"it must be one of 'a', 'b'$"):
        check_choice("x", value, Literal["a", "b"])
    check_choice("x", "a", ("a", "b"))
    check_choice("x", None, ("a", "b"), optional=True)


@pytest.mark.parametrize("value", ["*", [], [""], [1], 5, {"a": 1}, ()])
def test_globs_that_are_none(value):
    with pytest.raises(ValueError, match="a list of patterns"):
        check_globs("x", value)
    check_globs("x", None)
    check_globs("x", ["*a", "b"])


@pytest.mark.parametrize("value", ["", 3, None, b"a"])
def test_texts_that_are_none(value):
    with pytest.raises(ValueError, match="a string that is not empty"):
        check_text("x", value)


def test_a_long_value_is_cut():
    with pytest.raises(ValueError, match="is not allowed") as raised:
        check_count("x", "y" * 10_000)
    assert len(str(raised.value)) < 400
