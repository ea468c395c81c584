"""Runs of the whole suite in real processes: killed, stopped, asked to end, and with a disk that is full."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.together import bad_batches
from benchmarks.together_faults import FAULTS, Outcome, apart_by_weight, soak
from benchmarks.together_points import POINTS, SAVE_EVERY, STEPS, crash, death, hooks, losses_apart
from benchmarks.together_runs import RANKS, Settings
from harness.processes import apart

NEEDS_TORCHFT = pytest.mark.skipif(
    importlib.util.find_spec("torchft") is None, reason="torchft has wheels for Linux x86-64 only"
)
SIGNALS = [kind for kind in FAULTS if kind != "full disk"]


def disturbed(folder: Path, faults: list[str], seed: int = 0, **settings: Any) -> Outcome:
    """In a process that has done nothing yet, which forks the ranks."""
    return apart(soak, Settings(folder, **settings), faults, seed)


def test_killed_and_begun_anew(tmp_path):
    outcome = disturbed(tmp_path, ["kill all", "SIGTERM"], strategy="single", model="vit", steps=16, pause=0.02)
    assert outcome.different == []
    assert outcome.lives >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["gpt", "vit"])
@pytest.mark.parametrize("strategy", [name for name in RANKS if name != "ddp_ft"])
def test_signals_at_random(strategy, model, tmp_path):
    settings = {"strategy": strategy, "model": model, "steps": 60, "workers": 2, "bad": bad_batches(120, False)}
    outcome = disturbed(tmp_path, 2 * SIGNALS, **settings)
    assert outcome.different == []
    assert outcome.faults.total() > len(SIGNALS)
    assert outcome.lives > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk that is full")
def test_a_disk_that_is_full_for_a_while(tmp_path):
    outcome = disturbed(tmp_path, ["full disk", "kill all", "full disk"], strategy="ddp", steps=60, pause=0.1)
    assert outcome.different == []
    assert outcome.faults["full disk"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=NEEDS_TORCHFT) if name == "ddp_ft" else name for name in RANKS]
)
def test_twenty_crash_points(strategy, tmp_path):
    """In each of these hooks a rank ends itself by `kill -9`, and the run begins anew."""
    settings = Settings(
        tmp_path, strategy, "vit", steps=STEPS, save_every=SAVE_EVERY, bad=bad_batches(2 * STEPS, False)
    )
    found = apart(crash, settings, POINTS)
    assert found.different == []
    assert len(found.points) == found.lives - 1 == 20
    assert {point["rank"] for point in found.points} == set(range(RANKS[strategy]))
    assert hooks(found.points).count(";") == len(set(POINTS)) - 1
    assert found.again > 20  # or nothing would have been lost


@pytest.mark.slow
@pytest.mark.timeout(1800)
@NEEDS_TORCHFT
def test_a_replica_that_dies(tmp_path):
    """Whoever is left sums in another order: that is the one difference, and in float64 it stays what it is.

    Every step has a micro-batch whose loss is three times as large: one taken for another would be seen.
    """
    bad = dict.fromkeys(range(0, 16, 2), 3.0)
    alone, other = apart(death, Settings(tmp_path, "ddp_ft", "vit", steps=8, precision="64-true", bad=bad))
    assert max(apart_by_weight(alone, other).values()) < 1e-9
    assert max(losses_apart(alone, other).values()) < 1e-9
