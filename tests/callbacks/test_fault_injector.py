"""Faults come on the chosen rank, at the chosen step, once, and in the way that was asked for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from harness.processes import eventually, spawned
from harness.runs import fit, quiet_lightning
from lightning_eff.callbacks import FaultInjector, InjectedError, fault_injector
from tests.suite.models import Net


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
def test_it_raises_once_at_the_step(hook):
    injector = FaultInjector("raise", step=3, hook=hook)
    with pytest.raises(InjectedError, match=f"rank 0, step 3, {hook}"):
        fit(Net(), injector)
    assert injector.fired
    assert fit(Net(), injector).global_step == 8


def test_another_rank_is_left_alone_and_so_is_a_process_that_was_started_again(monkeypatch):
    assert fit(Net(), FaultInjector("raise", step=3, rank=1)).global_step == 8
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit(Net(), FaultInjector("raise", step=3)).global_step == 8


def test_corrupt_changes_one_bit_of_one_weight():
    seen = {}

    class Look(L.Callback):
        def __init__(self, when):
            self.when = when

        def on_train_batch_start(self, trainer, module, *args):
            if trainer.global_step == 2:
                seen[self.when] = {name: p.detach().clone() for name, p in module.named_parameters()}

    fit(Net(), Look("before"), FaultInjector("corrupt", step=2, parameter="head.*"), Look("after"), max_steps=3)
    differs = {name: (a != seen["after"][name]).nonzero().tolist() for name, a in seen["before"].items()}
    assert {name: places for name, places in differs.items() if places} == {"head.weight": [[0, 0]]}
    before, after = (seen[when]["head.weight"].view(torch.int32)[0, 0] for when in ("before", "after"))
    assert int(before ^ after) == 1


def test_slow_makes_every_step_longer_by_its_share(monkeypatch):
    slept, step = [], 0.02

    class Clock:
        """Each step takes the same, whatever the machine does beside."""

        now = 0.0

        def monotonic(self):
            self.now += step
            return self.now

        def sleep(self, seconds):
            slept.append(seconds)

    monkeypatch.setattr(fault_injector, "time", Clock())
    fit(Net(), FaultInjector("slow", step=2, slowdown=3.0), max_steps=8, limit_val_batches=0)
    assert slept == pytest.approx([3.0 * step] * 5)  # the first of the six that it sees has none to measure


def test_hang_ends_after_its_seconds():
    began = time.perf_counter()
    assert fit(Net(), FaultInjector("hang", step=1, seconds=0.5)).global_step == 8
    assert time.perf_counter() - began > 0.5


def _run(fault):
    quiet_lightning()
    fit(Net(), FaultInjector(fault, step=2), limit_val_batches=0)
    return True


@pytest.mark.slow
def test_stop_and_kill_are_the_real_signals():
    pool = spawned()
    try:
        result = pool.submit(_run, "stop")
        (pid,) = pool._processes
        stat = Path(f"/proc/{pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 60, "it did not stop")
        os.kill(pid, signal.SIGCONT)
        assert result.result(60)
        with pytest.raises(Exception, match="terminated abruptly"):
            pool.submit(_run, "kill").result(60)
    finally:
        pool.shutdown()
