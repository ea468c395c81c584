"""What a callback costs in a step, with it and without it in turn within one run."""

import math
import time

import pytest
import torch
from torch.utils.data import DataLoader

from harness.alternating import Alternating, cost_row, median_within
from harness.runs import fit
from tests.harness.regression import Regression


def _burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Burning(Regression):
    """Every step takes 4 ms of CPU time, and as much again as an arm says."""

    more = 0.0

    def training_step(self, batch, batch_idx):
        _burn(0.004 + self.more)
        return super().training_step(batch, batch_idx)


def test_blocks_come_in_turn_and_their_difference_is_what_an_arm_adds():
    module, entered = Burning(), []

    def arm(name, more):
        def enter(trainer):
            entered.append((name, trainer.global_step))
            module.more = more
            _burn(0.005)  # which is nobody's

        return enter

    turns = Alternating({"none": arm("none", 0.0), "some": arm("some", 0.002)}, block=4, warm=3)
    fit(module, turns, data=DataLoader(torch.randn(200, 2), batch_size=2), max_steps=3 + 5 * 8 + 5)

    blocks = [3 + 4 * block for block in range(12)]
    order = 3 * ["none", "some", "some", "none"]
    assert entered == [(order[at], blocks[at]) for at in range(1, 12) if order[at] != order[at - 1]]
    figures = turns.figures()
    assert [len(values) for kind in figures.values() for values in kind.values()] == [5] * 4
    row = cost_row([figures, figures], "some", "none")
    assert row["rounds"] == 5
    assert row["cpu_us_more"] == pytest.approx(2000, rel=0.6)
    assert row["cpu_us_more_low"] <= row["cpu_us_more"] <= row["cpu_us_more_high"]
    assert row["cpu_ratio"] == pytest.approx(1 + 2 / row["cpu_ms_a_step"], rel=0.1)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(500):
        middle, low, high = median_within(torch.rand(30, generator=generator).exp().tolist())
        assert low <= middle <= high
        held += low <= math.exp(0.5) <= high
    assert 0.93 <= held / 500 <= 0.99  # exactly 0.957 of many


def test_a_few_values_give_all_of_their_range():
    assert median_within([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
