"""Times: what counts as a step, and that variants stand side by side."""

import time

import pytest
import torch
from torch.utils.data import DataLoader

from harness import timing
from harness.runs import fit
from harness.timing import StepTimes, in_turn, over, ratio, seconds_of
from tests.harness.regression import Regression


def test_a_call_takes_as_long_as_it_takes():
    assert 0.05 <= seconds_of(lambda: time.sleep(0.05)) < 5


def test_times_are_of_the_steps_after_the_warmup(monkeypatch):
    looks = iter([0.0, 100.0, 101.0, 103.0, 107.0, 115.0])  # a slow first step, then 1, 2, 4 and 8 seconds
    monkeypatch.setattr(timing, "now", lambda: next(looks))
    times = StepTimes(warmup=1)
    fit(Regression(), times, data=DataLoader(torch.randn(20, 2), batch_size=2), max_steps=5)

    assert times.seconds == [1.0, 2.0, 4.0, 8.0]
    assert times.median == 3.0
    assert times.mean == 3.75
    assert next(looks, None) is None


def test_variants_are_measured_in_turn_in_an_order_that_rotates():
    order = []

    def measured(name, figure):
        return lambda: order.append(name) or figure

    figures = in_turn({"a": measured("a", 1.0), "b": measured("b", 2.0), "c": measured("c", 3.0)}, rounds=4)

    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert figures == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}


def test_a_ratio_is_taken_round_by_round():
    figures = {"slow": [2.0, 30.0, 8.0], "fast": [1.0, 10.0, 2.0]}

    assert ratio(figures, "slow", "fast") == (3.0, 2.0, 4.0)
    assert over(figures, "fast", "slow", "over_slow", digits=3) == pytest.approx(
        {"over_slow": 0.333, "over_slow_q1": 0.25, "over_slow_q3": 0.5}
    )
