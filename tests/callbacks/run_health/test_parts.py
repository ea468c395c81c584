"""The parts of RunHealth on their own: limits, verdicts, stragglers, weights, collections, the device's times."""

from __future__ import annotations

import gc
import json
import socket
import time
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from lightning_eff.callbacks.run_health.collector import Collector
from lightning_eff.callbacks.run_health.connections import Connections
from lightning_eff.callbacks.run_health.device_times import DeviceTimes
from lightning_eff.callbacks.run_health.limits import Limits
from lightning_eff.callbacks.run_health.phases import FORWARD, PHASES, WAITING
from lightning_eff.callbacks.run_health.stragglers import Stragglers, Window, median_of_known, summary, surely_above
from lightning_eff.callbacks.run_health.verdict import Standing, judge
from lightning_eff.callbacks.run_health.weights_hash import WeightsHash, differing

# --- how long there may be no sign of life --------------------------------------------------------------------------


def test_each_kind_has_a_limit_of_its_own():
    limits = Limits(seconds=3.0, factor=12.0, first_seconds=100.0)
    for _ in range(3):
        limits.note("step", 0.01)
        limits.note("validation", 2.0)
    assert [limits.of(kind) for kind in ("step", "validation", "save", "epoch")] == [3.0, 24.0, 100.0, 100.0]
    limits.note("save", 10.0)
    assert limits.of("save") == 120.0


def test_a_run_with_long_steps_now_and_then_gets_more_time():
    limits = Limits(seconds=1.0, factor=2.0, first_seconds=100.0)
    for number in range(100):
        limits.note("step", 5.0 if number % 10 == 0 else 0.1)
    assert limits.of("step") == 10.0  # twice the 99th percentile


def test_what_was_no_hang_may_take_twice_as_long_again():
    limits = Limits(seconds=1.0, factor=2.0, first_seconds=1.0)
    for _ in range(3):
        limits.note("step", 0.1)
    limits.was_wrong("step", 7.0)
    assert limits.of("step") == 14.0


# --- who holds up a run ---------------------------------------------------------------------------------------------


def _standing(rank, entered, stalled=3.0, phase="waiting", **more):
    return Standing(
        rank, f"host h, pid {rank}", 40, phase, stalled, {"0": entered}, "all_reduce", ("a.py:1 in f",), **more
    )


def test_the_rank_that_has_not_entered_the_collective_is_named():
    verdict = judge([_standing(0, 9), _standing(1, 8, phase="forward"), _standing(2, 9)], 3.0)
    assert (verdict.ranks, verdict.phases) == ((1,), ("forward",))
    assert "rank 1 (host h, pid 1) has not entered collective 9 (all_reduce); it stands in step 40" in verdict.text
    assert "rank 0 waits in all_reduce" in verdict.text
    assert "rank 2 waits in all_reduce" in verdict.text


def test_of_ranks_that_a_broadcast_has_let_go_on_the_last_is_named():
    assert judge([_standing(0, 8), _standing(1, 9), _standing(2, 7)], 3.0).ranks == (2,)


def test_one_that_does_not_answer_is_named_before_all_others():
    silent = Standing(2, "host h, pid 2", 39, "data", 0.0, silent="has been silent for 3.1 s: its process is stopped")
    verdict = judge([_standing(0, 9), _standing(1, 8), silent], 3.0)
    assert (verdict.ranks, verdict.phases) == ((2,), ("data",))
    assert "its process is stopped; it stands in step 39, phase 'data'" in verdict.text


@pytest.mark.parametrize("stalled", [3.2, 3.0])
@pytest.mark.parametrize("place", [(4, 17), (3, 40)])
def test_where_each_lacks_somewhere_it_counts_what_comes_first_in_the_program(place, stalled):
    """On a busy machine the rank that waits there may have come later than the one that has gone on waits elsewhere."""
    left_out = {"0": 9, "eval": 0}  # went on to the next collective, where the other does not come
    waits = {"0": 8, "eval": 1}
    one = Standing(0, "h", place[0], "forward", stalled, waits, "barrier", passed=place[1])
    two = Standing(1, "h", 4, "waiting", 3.1, left_out, "all_reduce", passed=23)
    verdict = judge([one, two], 3.0)
    assert verdict.ranks == (1,)
    assert "has not entered collective 1 of process group 'eval' (barrier)" in verdict.text


def test_at_one_place_it_counts_what_has_hung_longest():
    one = Standing(0, "h", 4, "forward", 3.2, {"0": 8, "eval": 1}, "barrier", passed=17)
    two = Standing(1, "h", 4, "forward", 3.1, {"0": 9, "eval": 0}, "all_reduce", passed=17)
    assert judge([one, two], 3.0).ranks == (1,)


def test_if_all_stand_in_one_place_nobody_is_accused():
    verdict = judge([_standing(0, 9), _standing(1, 9)], 3.0)
    assert verdict.ranks == ()
    assert "all ranks stand in the same collective" in verdict.text


# --- who is slow ----------------------------------------------------------------------------------------------------


def test_a_median_is_of_what_is_known():
    generator = np.random.default_rng(0)
    for shape in ((2, 30), (3, 10), (5, 1), (1, 4)):
        values = generator.random(shape)
        values[generator.random(shape) < 0.3] = np.nan
        values[0, 0] = 0.5
        nothing = np.isnan(values).all(1, keepdims=True)
        known = np.where(nothing, 0.0, values)  # numpy warns of a median of nothing
        expected = np.where(nothing, np.nan, np.nanmedian(known, 1, keepdims=True))
        np.testing.assert_array_equal(median_of_known(values), expected[:, 0])


EVERY = 10
STEP = 0.126  # seconds: forty are five


def _window(ranks, steps=EVERY, noise=0.0, slow=None, waiting=0.0, seed=0, delay=(0.0,) * 8):
    """Forward takes a step; ``slow`` is (rank, phase, share of it); so are ``waiting`` and each rank's ``delay``."""
    generator = torch.Generator().manual_seed(seed)
    told = []
    for rank in range(ranks):
        rows = torch.zeros(steps, len(PHASES), dtype=torch.float64)
        rows[:, FORWARD] = 1 + noise * torch.rand(steps, generator=generator)
        rows[:, WAITING] = waiting
        if slow is not None and slow[0] == rank:
            rows[:, slow[1]] += slow[2]
        told.append(summary((STEP * rows).tolist(), EVERY, [STEP * delay[rank]] * steps, 7, [1.0, 2.0]))
    return Window.of(np.stack(told), EVERY)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_slower_by_a_fifth_is_named_within_four_windows(ranks, rank):
    judged = Stragglers(0.1, 3)
    for number in range(4):
        finding = judged.judge(_window(ranks, noise=0.05, slow=(rank, PHASES.index("data"), 0.2), seed=number))
    assert finding is not None
    assert (finding.rank, finding.phase, finding.callback) == (rank, "data", None)
    assert 0.15 < finding.slower < 0.25


def test_a_slow_callback_is_known_by_its_index():
    judged = Stragglers(0.1, 3)
    finding = [judged.judge(_window(2, slow=(1, PHASES.index("callbacks"), 0.5))) for _ in range(4)][3]
    assert (finding.phase, finding.callback) == ("callbacks", 7)


@pytest.mark.parametrize("ranks", [2, 3])
def test_noise_and_single_long_steps_are_no_straggler(ranks):
    judged = Stragglers(0.1, 3)
    for number in range(300):
        window = _window(ranks, noise=0.5, seed=number)
        window.busy[number % ranks, number % EVERY] *= 10
        assert judged.judge(window) is None


@pytest.mark.parametrize(
    ("scatter", "alike", "least", "most"), [(0.1, 0.0, 20, 20), (0.2, 0.0, 5, 15), (0.2, 0.9, 0, 3)]
)
def test_the_more_the_steps_scatter_and_hang_together_the_less_is_said(scatter, alike, least, most):
    """Of a fifth more, forty steps long, in twenty runs; and of nothing more, nothing in any."""
    generator = np.random.default_rng(1)
    found = {0.0: 0, 0.2: 0}
    for more in found:
        for _ in range(20):
            steps = generator.normal(0, scatter, 40)
            for step in range(1, 40):
                steps[step] = alike * steps[step - 1] + (1 - alike**2) ** 0.5 * steps[step]
            found[more] += surely_above((1 + more) * np.exp(steps), 1.05)
    assert found[0.0] == 0
    assert least <= found[0.2] <= most


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_gets_less_of_its_cores_for_a_while_is_no_straggler(ranks):
    """On a machine with much else to do the system prefers one to another for seconds."""
    judged = Stragglers(0.1, 3)
    for number in range(60):
        rank, spell = number // 6 % ranks, [0.0] * ranks
        spell[rank] = 0.4
        window = _window(ranks, noise=0.05, slow=(rank, FORWARD, 0.4), seed=number, delay=spell)
        assert judged.judge(window) is None


@pytest.mark.parametrize("ranks", [2, 3])
def test_but_one_that_gets_less_for_long(ranks):
    judged, spell = Stragglers(0.1, 3), [0.0, 0.4, 0.0]
    windows = [_window(ranks, noise=0.05, slow=(1, FORWARD, 0.4), seed=n, delay=spell) for n in range(41)]
    findings = [judged.judge(window) for window in windows]
    assert findings[:39] == [None] * 39
    assert (findings[40].rank, findings[40].phase, findings[40].crowded) == (1, "forward", True)
    assert 0.35 < findings[40].slower < 0.45


def test_a_window_of_one_slow_spell_is_not_enough():
    judged = Stragglers(0.1, 3)
    slow = [judged.judge(_window(2, slow=(1, FORWARD, 1.0) if n % 3 == 0 else None, seed=n)) for n in range(30)]
    assert slow == [None] * 30


def test_if_all_wait_longer_than_they_used_to_it_is_the_network():
    judged = Stragglers(0.1, 3)
    assert all(judged.judge(_window(3, noise=0.05, waiting=0.1, seed=n)) is None for n in range(8))
    findings = [judged.judge(_window(3, noise=0.05, waiting=0.6, seed=n)) for n in range(4)]
    assert findings[:3] == [None, None, None]
    assert (findings[3].rank, findings[3].phase) == (None, "waiting")
    assert 0.2 < findings[3].slower < 0.5


def test_a_network_that_was_always_uneven_is_not_slow():
    """On a machine with much else to do, one window in five waits three times as long as most, and some meet."""
    judged = Stragglers(0.1, 3)
    waits = [0.6 if n % 5 == 0 or n > 60 else 0.2 for n in range(64)]
    assert all(judged.judge(_window(3, noise=0.05, waiting=wait, seed=n)) is None for n, wait in enumerate(waits))
    findings = [judged.judge(_window(3, noise=0.05, waiting=0.8, seed=n)) for n in range(4)]
    assert findings[3].phase == "waiting"


def test_a_rank_that_is_slow_is_not_taken_for_the_network():
    """The others wait for it, and it does not."""
    judged = Stragglers(0.1, 3)
    for n in range(8):
        judged.judge(_window(3, waiting=0.01, seed=n))
    for n in range(4):
        window = _window(3, waiting=1.0, slow=(1, FORWARD, 1.0), seed=n)
        window.medians[1, WAITING] = 0.001
        finding = judged.judge(window)
    assert (finding.rank, finding.phase) == (1, "forward")


def test_steps_that_are_not_known_yet_are_left_out():
    window = _window(2, steps=4)
    assert np.isnan(window.busy).sum(1).tolist() == [EVERY - 4] * 2
    judged = Stragglers(0.1, 1)
    assert [judged.judge(_window(2, steps=4, slow=(0, FORWARD, 1.0))) for _ in range(5)] == [None] * 5  # too few
    assert judged.judge(Window.of(np.stack([summary([], EVERY, [], -1, [])] * 2), EVERY)) is None


def test_forty_steps_are_needed_however_short_the_windows():
    judged, slow = Stragglers(0.1, 1), (0, FORWARD, 1.0)
    assert [judged.judge(_window(3, slow=slow)) for _ in range(3)] == [None, None, None]
    assert judged.judge(_window(3, slow=slow)).rank == 0


def test_nobody_is_judged_by_less_than_five_seconds():
    """Where steps are short, a core may be slower for as long as forty of them take, by what others do beside."""
    judged = Stragglers(0.1, 3)
    findings = []
    for _ in range(40):
        window = _window(2, slow=(1, FORWARD, 1.0))
        window.medians[:] *= 0.1  # 12.5 and 25 ms
        findings.append(judged.judge(window))
    assert [finding is not None for finding in findings] == [False] * 26 + [True] * 14


def test_nor_by_a_spell_that_does_not_last_as_long():
    judged = Stragglers(0.1, 3)
    slow = [
        judged.judge(_window(2, noise=0.05, slow=(1, FORWARD, 0.4) if n % 7 < 3 else None, seed=n)) for n in range(60)
    ]
    assert slow == [None] * 60


# --- equal weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_bit_changes_the_number(dtype):
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(dtype)
    hashed = WeightsHash(dict(module.named_parameters()))
    hashed.take()
    unchanged, numbers = hashed.halves(), []
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = 8 * dtype.itemsize
    with torch.no_grad():
        for parameter in module.parameters():
            for bit in range(bits):
                flat = parameter.view(integers).view(-1)
                before = flat[0].clone()
                flat[0] ^= -(2**bit) if bit == bits - 1 else 2**bit
                hashed.take()
                numbers.append(hashed.halves())
                flat[0] = before
    assert len(numbers) == 4 * bits
    assert unchanged not in numbers
    hashed.take()
    assert hashed.halves() == unchanged


def test_parameters_that_change_places_change_the_number():
    module = nn.ParameterList([torch.ones(3), torch.zeros(3)])
    hashed = WeightsHash(dict(module.named_parameters()))
    hashed.take()
    before = hashed.halves()
    module[0].data, module[1].data = module[1].data, module[0].data
    hashed.take()
    assert hashed.halves() != before


def test_the_minority_differs():
    same, other = [1.0, 2.0], [1.0, 3.0]
    assert differing(np.array([same, same])) == []
    assert differing(np.array([same, other])) == [1]
    assert differing(np.array([other, same, same])) == [0]
    assert differing(np.array([same, [np.nan, np.nan]])) == []


# --- garbage collection ---------------------------------------------------------------------------------------------


class _Cycle:
    def __init__(self):
        self.me = self


def test_garbage_is_collected_in_the_chosen_steps_and_in_no_other():
    collector = Collector(2)
    collector.attach()
    try:
        assert not gc.isenabled()
        gone = weakref.ref(_Cycle())
        collector.step(1)
        assert gone() is not None
        collector.step(2)
        assert gone() is None
        assert collector.collections == 1
    finally:
        collector.detach()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_that_has_switched_the_collector_off_is_left_alone():
    gc.disable()
    try:
        collector = Collector(2)
        collector.attach()
        collector.step(2)
        collector.detach()
        assert collector.collections == 0
        assert not gc.isenabled()
    finally:
        gc.enable()


# --- the device's times ---------------------------------------------------------------------------------------------


class _Event:
    """A mark in the queue of a device that has worked up to `done`."""

    done = 0.0
    queued = 0.0

    def record(self):
        self.at = _Event.queued

    def query(self):
        return self.at <= _Event.done

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def test_the_devices_times_take_the_place_of_the_hosts_when_it_has_come_so_far():
    _Event.done = _Event.queued = 0.0
    times = DeviceTimes(_Event)
    for _ in range(2):
        for phase, seconds in ((FORWARD, 1.0), (WAITING, 2.0), (FORWARD, 4.0), (PHASES.index("other"), 0.0)):
            times.mark(phase)
            _Event.queued += seconds
        times.close([0.5] * len(PHASES))
    assert list(times.ready()) == []
    _Event.done = 10.0  # the first step and a part of the second
    (step,) = times.ready()
    assert (step[FORWARD], step[WAITING], step[0]) == (5.0, 2.0, 0.5)
    _Event.done = 14.0
    assert len(list(times.ready())) == 1


# --- connections ----------------------------------------------------------------------------------------------------


def _talk(strangers):
    import torch.distributed as dist

    rank = dist.get_rank()
    connections = Connections(rank, dist.get_world_size(), dist.group.WORLD)
    try:
        mine = connections.peers[rank]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for _ in range(strangers):
                stranger.sendto(b"x" * 16 + json.dumps({"from": 0, "kind": "left"}).encode(), (mine.address, mine.port))
        dist.barrier()
        connections.send({"kind": "beat", "number": 10 + rank})
        heard, end = [], time.monotonic() + 10
        while not heard and time.monotonic() < end:
            message = connections.receive(0.2)
            heard += [message] if message is not None else []
        return mine.address, heard
    finally:
        connections.close()


def test_ranks_hear_each_other_and_no_stranger(pool):
    assert pool.run(_talk, 3) == [
        ("127.0.0.1", [{"kind": "beat", "number": 11, "from": 1}]),
        ("127.0.0.1", [{"kind": "beat", "number": 10, "from": 0}]),
    ]
