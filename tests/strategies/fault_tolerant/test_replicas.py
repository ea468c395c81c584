"""The agreement of replicas, under deaths and half-failed operations by dice."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff.strategies.fault_tolerant.handover import Handover
from lightning_eff.strategies.fault_tolerant.rendezvous import LeftBehindError
from lightning_eff.strategies.fault_tolerant.replicas import Replicas
from tests.strategies.fault_tolerant.replica_world import LIMITS, Dead, Manager, World, total

STEPS = 12


class Replica:
    """Trains a number: adds to it, at each step, what all replicas give; and agrees on things between steps."""

    def __init__(self, world: World, index: int, count: int) -> None:
        self.world, self.index, self.count = world, index, count
        self.lives = 0
        # By the run, as all may have died and begun anew, the step and the operation.
        self.log: dict[tuple[float, int, int], float] = {}
        self.values: dict[tuple[float, int], float] = {}
        self.latest: tuple[float, int, int] | None = None  # what no other may have seen
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        while self.world.error is None and not self.world.finished:
            name = f"{self.index}:{self.lives:03d}"
            try:
                self.live(name)
                with self.world.changed:
                    self.world.kill(name)
                return
            except (Dead, LeftBehindError):
                self.lives += 1
                if self.latest is not None:
                    del self.log[self.latest]
                    self.latest = None
                with self.world.changed:
                    self.world.kill(name)
                time.sleep(0.002)
            except BaseException as error:
                with self.world.changed:
                    self.world.error = self.world.error or error
                    self.world.changed.notify_all()

    def live(self, name: str) -> None:
        state = {"value": float(self.index), "run": 0.0}
        handover = Handover(lambda: dict(state), state.update, "")
        manager: Any = Manager(self.world, name, handover.give, handover.take)
        replicas = Replicas(self.index, self.count, manager, LIMITS, 0, lambda: 0, handover)

        while replicas.step < STEPS:
            if replicas.begin() and self.world.finished:
                return  # as the launcher's file says
            self.latest = None
            before = replicas.step
            replicas.within(lambda group: total(group, 1.0, 2), 0.0)  # a micro-batch that is not repeated
            while True:
                replicas.last_part()
                replicas.within(lambda group: total(group, 1.0, 3), 0.0)
                share = replicas.within(lambda group: total(group, 1.0 / group.world, 4), 0.0)
                if replicas.commit():
                    assert round(share, 4) == 1.0
                    if before == 0:
                        state["run"] = float(manager.quorum_id)  # the same for all who commit it
                    state["value"] = state["value"] + 1.0
                    break
                if replicas.again():
                    break
            replicas.settle(lambda group: total(group, 0.0, 5), 0.0)
            assert replicas.step == before + 1
            with self.world.changed:
                self.values[state["run"], replicas.step] = state["value"]
                if replicas.step == STEPS - 4:
                    self.world.quiet = True  # so that all come to the end
            for number in range(replicas.step % 3):
                result = replicas.agree(lambda group: total(group, 1.0, 6), 0.0)
                self.latest = (state["run"], replicas.step, number)
                self.log[self.latest] = result
        replicas.finishing = True
        replicas.agree(lambda group: total(group, 0.0, 7), 0.0)
        self.world.finished = True


class InParts(Replica):
    """The same with steps of one to three parts, each of which is committed and settled, as in manual optimization."""

    def live(self, name: str) -> None:
        state = {"value": float(self.index), "run": 0.0, "batch": 0.0}
        handover = Handover(lambda: dict(state), state.update, "")
        manager: Any = Manager(self.world, name, handover.give, handover.take)
        replicas = Replicas(self.index, self.count, manager, LIMITS, 0, lambda: 0, handover)

        while replicas.step < STEPS:
            if replicas.begin() and self.world.finished:
                return
            self.latest = None
            replicas.last_part()
            start, batch = replicas.step, state["batch"]
            parts = min(1 + int(batch) % 3, STEPS - start)
            done = 0
            while done < parts:
                stands = float(100 * batch + done)
                replicas.within(lambda group, stands=stands: total(group, stands, 3), 0.0)
                both = replicas.within(lambda group, stands=stands: (group.world, total(group, stands, 4)), None)
                if replicas.commit():
                    assert both is not None
                    assert both[1] == both[0] * stands, "all are in the same part of the same step"
                    if start + done == 0:
                        state["run"] = float(manager.quorum_id)
                    state["value"] = state["value"] + 1.0
                elif not replicas.again():
                    continue
                replicas.settle(lambda group: total(group, 0.0, 5), 0.0)
                replicas.goes_on(True)
                done += 1
                assert replicas.step == start + done
                with self.world.changed:
                    self.values[state["run"], replicas.step] = state["value"]
                    if replicas.step >= STEPS - 4:
                        self.world.quiet = True
            replicas.goes_on(False)
            result = replicas.agree(lambda group: total(group, 1.0, 6), 0.0)  # buffers
            state["batch"] = batch + 1
            self.latest = (state["run"], replicas.step, 0)
            self.log[self.latest] = result
        replicas.finishing = True
        replicas.agree(lambda group: total(group, 0.0, 7), 0.0)
        self.world.finished = True


@pytest.mark.parametrize(("deaths", "glitches"), [(0.0, 0.0), (0.0, 0.05), (0.02, 0.0), (0.01, 0.03)])
@pytest.mark.parametrize("count", [2, 3])
def test_all_stay_together(count: int, deaths: float, glitches: float) -> None:
    together(count, deaths, glitches, range(8))


@pytest.mark.parametrize(("deaths", "glitches"), [(0.0, 0.05), (0.02, 0.0), (0.01, 0.03)])
@pytest.mark.parametrize("count", [2, 3])
def test_all_stay_together_in_parts(count: int, deaths: float, glitches: float) -> None:
    together(count, deaths, glitches, range(8), InParts)


@pytest.mark.slow
@pytest.mark.parametrize(("deaths", "glitches"), [(0.0, 0.1), (0.03, 0.0), (0.01, 0.05)])
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("kind", [Replica, InParts])
def test_all_stay_together_for_long(kind: type[Replica], count: int, deaths: float, glitches: float) -> None:
    together(count, deaths, glitches, range(100, 150), kind)


def together(count: int, deaths: float, glitches: float, seeds: range, kind: type[Replica] = Replica) -> None:
    for seed in seeds:
        world = World(seed, deaths, glitches)
        replicas = [kind(world, index, count) for index in range(count)]
        for replica in replicas:
            replica.thread.start()
        for replica in replicas:
            replica.thread.join(60.0)
            assert not replica.thread.is_alive()
        if world.error is not None:
            raise AssertionError(f"seed {seed}") from world.error
        for found in ([replica.values for replica in replicas], [replica.log for replica in replicas]):
            for key in {key for each in found for key in each}:
                assert len({each[key] for each in found if key in each}) == 1, f"seed {seed}, {key}"
        last = max(run for replica in replicas for run, _ in replica.values)
        made = {step for replica in replicas for run, step in replica.values if run == last}
        assert made == set(range(1, STEPS + 1)), f"seed {seed}, run {last}"
