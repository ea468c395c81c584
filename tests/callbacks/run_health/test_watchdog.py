"""What a watchdog makes of messages that come late, or not at all, as on a machine that is too busy."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace

import pytest
import torch

from harness.processes import eventually
from lightning_eff.callbacks.run_health import stacks, watchdog
from lightning_eff.callbacks.run_health.connections import Peer
from lightning_eff.callbacks.run_health.limits import Limits
from lightning_eff.callbacks.run_health.phases import Phases
from lightning_eff.callbacks.run_health.watchdog import Watchdog
from lightning_eff.plugins.async_checkpoint.staging import Stager

LIMIT = 2.0  # seconds


class Wire:
    """Connections of two ranks on one machine, on which nothing comes but by hand."""

    def __init__(self, pid: int) -> None:
        self.rank = 0
        one = Peer("h", pid, "here", "127.0.0.1", 1)
        self.peers = [one, replace(one)]
        self.sent, self.queue = [], []

    def send(self, message):
        self.sent.append(message["kind"])

    def receive(self, seconds):
        return self.queue.pop(0) if self.queue else time.sleep(seconds)

    def close(self):
        pass


@pytest.fixture
def other():
    """A process to be the other rank."""
    with subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1) as one:
        assert one.stdout is not None
        one.stdout.readline()
        yield one
        one.kill()


@pytest.fixture
def watch(other, tmp_path, monkeypatch):
    """A watchdog of rank 0, whose main thread waits in collective 9 since `LIMIT` and a little."""
    monkeypatch.setattr(watchdog, "_collectives", lambda: {"0": 9})
    limits = Limits(LIMIT, 12.0, LIMIT)
    dog = Watchdog(Phases(), Wire(other.pid), limits, tmp_path, abort=None)
    dog.phases.since = time.perf_counter() - LIMIT - 0.1
    dog._awake, dog._looked = dog.phases.since, time.perf_counter()
    yield dog
    if dog._writer is not None:
        dog._writer.join()
    dog._place.close()


def _says(dog, kind, at, **more):
    return {**dog._beat(), "from": 1, "kind": kind, "at": at, **more}


def _answer(dog, at, kind="answer"):
    where = {"since": at - 3, "stalled": 3.0, "groups": {"0": 8}, "collective": None, "stack": []}
    return _says(dog, kind, at, **where, passed=3, phase="forward")


def test_a_stopped_rank_is_named_at_once_although_its_last_message_was_read_late(watch, other, capsys):
    other.send_signal(signal.SIGSTOP)
    eventually(lambda: stacks.state_of(other.pid) != stacks.LIVES)
    now = time.perf_counter()
    watch._hear(_says(watch, "beat", now - LIMIT), now)  # which lay in the queue
    watch._look(now)
    watch._look(now + 0.01)
    assert watch.connections.sent == ["ask"]
    assert [verdict.ranks for verdict in watch.verdicts] == [(1,)]
    assert "has been silent for 2.0 s: its process is stopped" in capsys.readouterr().err


def test_one_that_lives_and_is_late_is_asked_again(watch):
    now = time.perf_counter()
    watch._hear(_says(watch, "beat", now - 0.4), now)
    watch._look(now)
    watch._hear(_says(watch, "beat", now + 0.6), now + 0.6)
    watch._look(now + 0.75)
    assert watch.connections.sent == ["ask", "ask"]
    assert not watch.verdicts
    watch._hear(_answer(watch, now + 1), now + 1.1)
    watch._look(now + 1.1)
    assert [(verdict.ranks, verdict.phases) for verdict in watch.verdicts] == [((1,), ("forward",))]


def test_but_not_for_ever(watch):
    now = time.perf_counter()
    for tick in range(50):
        watch._hear(_says(watch, "beat", now + tick / 10), now + tick / 10)
        watch._look(now + tick / 10)
        if watch.verdicts:
            break
    assert watch.connections.sent == ["ask"] * 4
    assert 2.7 <= tick / 10 <= 3.3


def test_one_that_asks_again_gets_the_answer_again(watch):
    now = time.perf_counter()
    watch._hear(_answer(watch, now, "ask"), now)
    watch._hear(_answer(watch, now, "ask"), now)
    assert watch.connections.sent == ["answer", "answer"]


@pytest.mark.parametrize("seconds", [LIMIT + 0.1, 61.0])
def test_what_compiles_gets_the_time_of_a_first_step(watch, monkeypatch, seconds):
    watch.limits = Limits(LIMIT, 12.0, 60.0)
    for _ in range(3):
        watch.limits.note("step", 0.01)
    watch.kind = "step"
    code = compile("def f(): return traceback.extract_stack()", "/x/torch/_inductor/codecache.py", "exec")
    compiler = {"traceback": traceback}
    exec(code, compiler)
    monkeypatch.setattr(stacks, "main_stack", compiler["f"])
    watch.phases.since = watch._awake = time.perf_counter() - seconds
    watch._look(time.perf_counter())
    assert watch.connections.sent == ([] if seconds < 60 else ["ask"])


@pytest.mark.parametrize("seconds", [LIMIT + 0.1, 61.0])
def test_so_does_a_save_that_waits_until_a_slow_disk_has_written_another(watch, seconds):
    watch.limits = Limits(LIMIT, 12.0, 60.0)
    for _ in range(3):
        watch.limits.note("save", 0.01)
    watch.kind = "save"
    stager = Stager()
    staged = [stager.stage({"weight": torch.zeros(2)}) for _ in range(2)]

    def look():
        eventually(lambda: stacks.main_stack()[-1].name == "stage")
        watch.phases.since = watch._awake = time.perf_counter() - seconds
        watch._look(time.perf_counter())
        stager.release(staged[0])

    looks = threading.Thread(target=look)
    looks.start()
    stager.stage({"weight": torch.zeros(2)})
    looks.join()
    assert watch.connections.sent == ([] if seconds < 60 else ["ask"])


@pytest.mark.parametrize("failed", [True, False])
def test_a_judgement_under_way_is_given_when_the_run_fails_and_not_when_it_goes_on(watch, failed, capsys):
    """With ``abort`` the other may have judged and ended, which is an error in the main thread's collective."""
    now = time.perf_counter()
    watch._hear(_says(watch, "beat", now), now)
    watch._look(now)
    watch.connections.queue.append(_answer(watch, now))
    watch._failed = failed
    watch._over.set()
    watch._run()
    assert [verdict.ranks for verdict in watch.verdicts] == ([(1,)] if failed else [])
    assert capsys.readouterr().err.count("RunHealth: no sign of life for") == failed


@pytest.mark.parametrize("spoken", [True, False])
def test_whoever_does_not_speak_ends_only_behind_the_report(watch, monkeypatch, capsys, spoken):
    """Else the other's main thread may fail for it, which looks as if the run went on there, and nobody reports."""
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: print("ended", file=sys.stderr))
    monkeypatch.setattr(watchdog, "_TO_SPEAK", 0.3)
    watch.connections.rank, watch.abort = 1, 75
    now = time.perf_counter()
    watch._hear(_answer(watch, now, "ask") | {"from": 0}, now)
    if spoken:
        watch.connections.queue += [_says(watch, "beat", now) | {"from": 0}, {"kind": "told", "from": 0}]
    watch._look(now + 1)
    told = capsys.readouterr().err
    assert told.count("RunHealth: no sign of life for") == (not spoken)
    assert told.endswith("ended\n")
    assert time.perf_counter() - now < 0.25 or not spoken
    assert watch.connections.queue == []
