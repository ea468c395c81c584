"""The states that a worker sends with each batch."""

import numpy as np
import pytest

from lightning_eff.callbacks.exact_resume.worker import raw_random_state

pytestmark = pytest.mark.usefixtures("numpy_as_it_was")


@pytest.fixture
def numpy_as_it_was():
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def _is_told() -> bool:
    told, true = raw_random_state()[2], np.random.get_state()
    return all(np.array_equal(mine, its) for mine, its in zip(told, true, strict=True))


def test_numpys_state_is_the_one_that_it_has_whatever_was_drawn():
    np.random.seed(0)
    assert _is_told()
    assert _is_told()
    for draw in (np.random.random, np.random.standard_normal, np.random.standard_normal, np.random.standard_normal):
        draw()
        assert _is_told()
        assert _is_told()
    between = np.random.get_state()  # a second normal number is at hand
    assert between[3] == 1
    np.random.standard_normal()
    np.random.random(1000)
    assert _is_told()
    np.random.set_state(between)
    assert _is_told()
    np.random.seed(0)
    assert _is_told()


def test_numpys_state_is_not_built_anew_where_nothing_was_drawn():
    np.random.seed(0)
    first = raw_random_state()[2]
    assert raw_random_state()[2] is first
    np.random.random()
    assert raw_random_state()[2] is not first
