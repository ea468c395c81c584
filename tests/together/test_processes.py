"""Runs of the whole suite in real processes: killed, stopped, asked to end, and with a disk that is full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.together import bad_batches
from benchmarks.together_faults import FAULTS, Outcome, soak
from benchmarks.together_runs import Settings
from harness.processes import apart

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
@pytest.mark.parametrize("strategy", ["single", "ddp"])
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
