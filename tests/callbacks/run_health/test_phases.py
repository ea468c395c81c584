"""Where the time of a step goes, in real runs of one process."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.utils.data import DataLoader

from harness.runs import fit
from lightning_eff.callbacks import RunHealth
from lightning_eff.callbacks.run_health.delay import Delay
from lightning_eff.callbacks.run_health.phases import BACKWARD, FORWARD, OTHER, PHASES, WAITING, Phases
from lightning_eff.callbacks.tensorboard_layout.charts import draws

SLEEP = 0.02


class Loader(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(SLEEP)
            yield batch


class Sleepy(L.LightningModule):
    """Each of its parts takes a known time more than nothing."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        time.sleep(2 * SLEEP)
        loss = self.net(batch).square().mean()
        loss.register_hook(lambda gradient: time.sleep(3 * SLEEP))
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        time.sleep(SLEEP)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        time.sleep(SLEEP)
        return batch

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *args: time.sleep(SLEEP))
        return optimizer

    def train_dataloader(self):
        return Loader(torch.ones(32, 2), batch_size=2)

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 2), batch_size=2)


class Slow(L.Callback):
    def on_train_batch_end(self, *args):
        time.sleep(2 * SLEEP)


@pytest.mark.parametrize("manual", [False, True])
def test_every_phase_has_what_it_took(manual):
    health = RunHealth(every_n_steps=5, hang_seconds=None)
    fit(Sleepy(manual), health, Slow(), max_steps=6, limit_val_batches=0)
    names = [*PHASES, *health._phases.names[len(PHASES) :]]
    # The shortest of five: a sleep is never too short, and on a busy machine now and then too long.
    times = dict(zip(names, map(min, zip(*health._steps, strict=True)), strict=True))
    expected = {"data": 1, "transfer": 1, "forward": 2, "backward": 3, "optimizer": 1, "Slow": 2}
    for name, sleeps in expected.items():
        assert sleeps * SLEEP <= times[name] < (sleeps + 1) * SLEEP, (name, times)
    for step in health._steps:
        assert step[PHASES.index("callbacks")] == pytest.approx(sum(step[len(PHASES) :]))
    assert health.times()["callbacks/Slow"][0] >= 2 * SLEEP
    assert times["waiting"] < SLEEP
    assert times["validation"] == times["saving"] == 0


def test_what_it_logs_begins_with_the_first_window_and_has_one_chart(tmp_path):
    health = RunHealth(every_n_steps=3, hang_seconds=None, log_details=True)
    logger = CSVLogger(tmp_path)
    fit(Sleepy(), health, Slow(), logger=logger, log_every_n_steps=1, max_steps=8, limit_val_batches=0)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("run_health/waiting")]
    # The window of three steps is read two steps later, at the start of the sixth batch.
    assert [int(row["step"]) for row in rows] == [5, 6, 7]
    logged = {name: float(value) for name, value in rows[0].items() if name.startswith("run_health/")}
    assert not [name for name, value in logged.items() if math.isnan(value)]
    assert {"run_health/step_seconds", "run_health/seconds/forward", "run_health/seconds/callbacks/Slow"} <= set(logged)
    charts = health.tensorboard_charts(None)
    for name in logged:
        assert sum(draws(chart, name) for chart in charts.values()) == 1, name
    for title, chart in charts.items():
        assert any(draws(chart, name) for name in logged), title
    assert len(RunHealth().tensorboard_charts(None)) == 4


def test_no_moment_is_counted_twice_or_left_out(tmp_path):
    health = RunHealth(every_n_steps=1, hang_seconds=None)
    steps, marks = [], []

    class Note(L.Callback):
        """Behind RunHealth, which stands first: the step before has just been closed."""

        def on_train_batch_start(self, *args):
            marks.append(time.perf_counter())
            steps.append(sum(health._steps[-1][: len(PHASES)]) if health._steps else 0.0)

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(Sleepy(), health, Note(), saver, max_steps=6, val_check_interval=3)
    assert len(steps) == 6
    # RunHealth's own mark comes a moment before the other's, which on a busy machine may be a long one.
    assert sum(steps[1:]) == pytest.approx(marks[-1] - marks[0], abs=0.04)
    # Validation of two batches and the save are in the step behind which they come.
    assert max(steps) > min(steps[1:]) + SLEEP


def test_validation_and_saving_are_phases_of_their_own(tmp_path):
    health = RunHealth(every_n_steps=6, hang_seconds=None)
    seen = []

    class Note(L.Callback):
        def on_train_batch_start(self, *args):
            seen.extend(health._steps)

        def on_validation_batch_start(self, *args):
            assert health._phases.validating
            assert health._phases.place == "validation"

        def on_save_checkpoint(self, *args):
            assert health._phases.saving
            time.sleep(SLEEP)

    fit(Sleepy(), health, Note(), ModelCheckpoint(tmp_path, every_n_train_steps=2), max_steps=6, val_check_interval=3)
    validation = [step[PHASES.index("validation")] for step in health._steps]
    saving = [step[PHASES.index("saving")] for step in health._steps]
    assert [seconds >= 2 * SLEEP for seconds in validation] == [False, False, True, False, False]
    assert [seconds > 0 for seconds in saving] == [False, True, False, True, False]


def test_the_users_own_profiler_sees_all_that_it_saw():
    def actions(*callbacks):
        profiler = SimpleProfiler()
        fit(Sleepy(), *callbacks, max_steps=3, limit_val_batches=0, profiler=profiler)
        assert "profile" not in vars(profiler)
        return {name: len(times) for name, times in profiler.recorded_durations.items() if "RunHealth" not in name}

    assert actions(RunHealth(hang_seconds=None)) == actions()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_ours_stays(fails):
    class Fail(L.Callback):
        def on_train_batch_end(self, *args):
            if fails:
                raise KeyError("a bug")

    health = RunHealth()
    try:
        trainer = fit(Sleepy(), health, Fail(), max_steps=2, limit_val_batches=0)
        assert not fails
        loop = trainer.fit_loop.epoch_loop
        assert not {"profile", "start", "stop"} & vars(trainer.profiler).keys()
        assert "_broadcast_sigterm_tensor" not in vars(loop)
        assert "run" not in vars(loop.val_loop)
        assert not {"barrier", "broadcast"} & vars(trainer.strategy).keys()
    except KeyError:
        assert fails
    assert not health._watchdog._thread.is_alive()
    assert health._watchdog._place.descriptor == -1


def test_the_end_of_the_backward_pass_is_waiting():
    clock = Phases()
    weight = torch.ones(2, requires_grad=True)
    loss = weight.sum()
    clock.open, clock.here = [FORWARD], OTHER  # within a hook that forward is around
    clock.backward_begins(loss)
    assert clock.open == [BACKWARD]
    seen = []
    clock.on_gradients = lambda: seen.append((clock.here, weight.grad is not None))
    loss.backward()
    assert seen == [(WAITING, True)]
    clock.backward_has_ended()
    assert clock.open == [FORWARD]


def test_a_parameter_tells_of_each_backward_pass_and_a_frozen_one_leaves_it_to_the_loss():
    """A hook of each loss would be made anew in each step. One pass may go unmarked when the parameter is frozen."""
    clock, net = Phases(), nn.Linear(2, 1)
    clock.listen_to(net)
    hooked, waits = [], []
    for frozen in (False, False, True, True, False, False):
        net.weight.requires_grad_(not frozen)
        loss = net(torch.ones(1, 2)).sum()
        clock.turn(FORWARD)
        clock.backward_begins(loss)
        hooked.append(bool(loss._backward_hooks))
        loss.backward()
        waits.append(clock.here == WAITING)
    assert hooked == [True, False, False, True, True, False]
    assert waits == [True, True, False, True, True, True]
    clock.detach()
    assert not net.weight._post_accumulate_grad_hooks


def test_the_time_without_a_core_is_asked_for_while_somebody_looks_slow(monkeypatch):
    clock, weight = Phases(), torch.ones(2, requires_grad=True)
    told = iter([1.0, 4.0, 4.5, 6.0, 6.5, 7.0])
    monkeypatch.setattr(Delay, "read", lambda self: next(told))
    fit(Sleepy(), RunHealth(hang_seconds=None), max_steps=1, limit_val_batches=0)  # nobody asks
    clock._delay = Delay()
    delays = []
    for asks in (False, True, True, True, False, False):
        clock.ask_delay = asks
        loss = weight.sum()
        clock.backward_begins(loss)
        loss.backward()
        delays.append(clock.delayed)
        clock.backward_has_ended()
        clock.take()
    assert delays == [0.0, 0.0, 3.0, 1.5, 0.5, 0.0]  # what is in a wait, 0.5 twice, is nobody's
    clock.detach()


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="Linux tells it")
def test_a_thread_that_shares_its_core_is_told_how_long_it_had_none():
    cores = os.sched_getaffinity(0)
    other = None
    delay = Delay()
    try:
        os.sched_setaffinity(0, {min(cores)})
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the core
        before, end = delay.read(), time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        assert delay.read() - before > 0.05
    finally:
        if other is not None:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, cores)
        delay.close()
    assert delay.read() == 0.0
