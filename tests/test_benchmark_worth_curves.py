"""Averages, branched decays, compression in a decay, GradES beside EarlyStopping: what is compared is what is said."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks.worth import averaging, compression, grades
from benchmarks.worth.clips import Fixed
from benchmarks.worth.stacks import Stack
from benchmarks.worth.workloads import WORKLOADS
from lightning_eff.compression import BF16
from lightning_eff.functional.wsd import WSD


def _stack() -> Stack:
    return Stack(WORKLOADS["CNN"], [3, 4], [partial(Fixed, math.inf)] * 2, 0.05)


def _train(stack, schedule, begin, end):
    for step in range(begin, end):
        stack.step(step)
        schedule.step()


def test_a_decay_that_branches_off_is_the_run_that_had_it_from_the_start_and_leaves_its_own_alone(monkeypatch):
    monkeypatch.setattr(averaging, "WARM_UP", 2)
    planned, stable, alone = _stack(), _stack(), _stack()
    _train(planned, WSD(planned.optimizers[""], ends=9, warmup_steps=2, decay_steps=4), 0, 9)
    schedules = [WSD(each.optimizers[""], ends=100, warmup_steps=2) for each in (stable, alone)]
    _train(stable, schedules[0], 0, 5)
    decayed = averaging._decayed(stable, schedules[0], 5, 9)
    _train(stable, schedules[0], 5, 7)
    _train(alone, schedules[1], 0, 7)

    torch.testing.assert_close(decayed, planned.score(), rtol=0, atol=0)
    for name, value in stable.parameters.items():
        assert torch.equal(value, alone.parameters[name])


def test_averages_are_of_the_last_snapshots_and_of_every_step(monkeypatch):
    monkeypatch.setattr(averaging, "WARM_UP", 0)
    stack = _stack()
    averages = averaging.Averages(stack)
    name, value = next(iter(stack.parameters.items()))
    start = value.detach().clone()
    for step in range(1, 41):
        with torch.no_grad():
            value.add_(1)
        averages.update(step)

    torch.testing.assert_close(averages.of(40, number=3, apart=10)[name], start + 30)
    kept = 0.5 ** (1 / 25)
    behind = sum((1 - kept) * kept**age * age for age in range(40)) + kept**40 * 40
    torch.testing.assert_close(averages.ema[25][name], start + 40 - behind)


def test_noise_is_what_a_straight_line_leaves():
    line = torch.linspace(2, 1, 101)
    about = 0.1 * torch.tensor([1.0, -1.0]).repeat(51)[:101]
    found = averaging._noise(torch.stack([line + about, line - about], 1))

    assert found["checkpoint_sd"] == pytest.approx(0.1, rel=0.02)
    assert found["seed_sd"] == pytest.approx(0.2 / math.sqrt(2), rel=1e-3)
    assert averaging._noise(line[:, None].repeat(1, 2))["later_is_better"] == 1.0


def test_a_compressed_run_is_dense_training_but_for_what_the_compressor_loses(monkeypatch):
    monkeypatch.setattr(compression, "STEPS", 8)
    monkeypatch.setattr(compression, "WARM_UP", 2)
    dense = compression.train(None, 0)

    assert compression.train(BF16(), 0) == pytest.approx(dense, abs=1e-3)
    assert dense[1] < dense[0] < math.log(256)


@pytest.mark.parametrize("arm", grades.ARMS)
def test_only_early_stopping_validates(arm, monkeypatch):
    monkeypatch.setattr(grades, "VALIDATIONS", 4)
    build, schedule, _ = grades.make.__globals__["RUNS"]["CNN, cosine"]
    monkeypatch.setitem(grades.make.__globals__["RUNS"], "CNN, cosine", (build, schedule, 40))
    row = grades.train("CNN, cosine", 0, arm)

    assert (row["validating"] > 0) == (row["best"] != "") == (arm == "EarlyStopping")
    assert row["seconds"] > row["validating"]
    assert row["steps"] == 40
