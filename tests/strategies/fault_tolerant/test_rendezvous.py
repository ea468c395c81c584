"""Who belongs to a run: strangers are turned away, and who was asleep does not go on alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff import _launched
from lightning_eff._launched import Progress
from lightning_eff.strategies.fault_tolerant.handover import Handover
from lightning_eff.strategies.fault_tolerant.manager import _Client
from lightning_eff.strategies.fault_tolerant.rendezvous import (
    START,
    LeftBehindError,
    Position,
    StrangerError,
    strangers,
    writer_of,
)
from lightning_eff.strategies.fault_tolerant.replicas import Replicas
from tests.strategies.fault_tolerant.replica_world import LIMITS, Manager, World, total


def position(index: int, veteran: bool, **others: Any) -> Position:
    values = {"step": 7, "agreed": 0, "where": START, "writer": False, "waits": False, "seed": index}
    return Position(index=index, veteran=veteran, **{**values, "layout": 1, "run": 2, "stays": 0, **others})


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([position(0, True), position(1, False)], {}),
        ([position(1, True), position(1, False)], {1: "in the run already"}),
        ([position(1, False), position(1, True)], {0: "in the run already"}),
        ([position(0, True), position(3, False)], {1: "too high for max_replicas=3"}),
        ([position(0, False, run=9), position(1, True), position(2, True)], {0: "another run"}),
        ([position(0, False, layout=9), position(1, True)], {0: "other parameters in training"}),
        # Nobody is in the run yet: the first counts.
        ([position(0, False), position(0, False), position(1, False, run=9)], {1: "in the run", 2: "another run"}),
    ],
)
def test_who_is_a_stranger(positions: list[Position], expected: dict[int, str]) -> None:
    found = strangers(positions, count=3)
    assert found.keys() == expected.keys()
    for rank, words in expected.items():
        assert words in found[rank]


def test_who_writes_goes_on_writing() -> None:
    assert writer_of([position(0, False), position(1, True), position(2, True, writer=True)]).index == 2
    assert writer_of([position(0, False), position(1, True)]).index == 1
    assert writer_of([position(2, False), position(1, False)]).index == 2


def test_nobody_in_the_run_takes_a_strangers_state() -> None:
    """torchft takes the one with most steps for the one that is ahead."""
    taken: list[dict[str, Any]] = []
    mine = Handover(dict, taken.append, "mine")
    with pytest.raises(StrangerError, match=r"'mine'.*'other'"):
        mine.take(Handover(dict, print, "other").give())
    mine.take(Handover(lambda: {"weights": 1}, print, "mine").give())
    mine.veteran = True
    mine.take(Handover(dict, print, "mine").give())  # of somebody who has begun elsewhere
    assert (taken, mine.refused) == ([{"weights": 1}], True)

    def misfit(state: dict[str, Any]) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(StrangerError, match=r"does not fit here \(size mismatch\)"):
        Handover(dict, misfit, "mine").take(mine.give())


class Living:
    """A replica in a thread that makes steps until it is told to stop."""

    def __init__(
        self, world: World, index: int, run: str = "", count: int = 3, begins_at: int = 0, leaves_behind: int = -1
    ) -> None:
        self.leaves_behind = leaves_behind
        self.world, self.name = world, f"{index}:{run}{begins_at}"
        state: dict[str, float] = {}
        handover = Handover(lambda: dict(state), state.update, run)
        self.manager: Any = Manager(world, self.name, handover.give, handover.take)
        self.manager.step = begins_at
        self.replicas = Replicas(index, count, self.manager, LIMITS, 0, lambda: 0, handover)
        self.error: BaseException | None = None
        self.last = 10**9
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while self.replicas.step < self.last:
                if self.replicas.step == self.leaves_behind:
                    self.replicas.leave(7)
                self.replicas.begin()
                if self.replicas.all_leave:
                    self.replicas.depart()
                self.replicas.last_part()
                self.replicas.within(lambda group: total(group, 1.0, 3), 0.0)
                if self.replicas.commit() or self.replicas.again():
                    self.replicas.settle(lambda group: total(group, 0.0, 5), 0.0)
        except BaseException as error:
            self.error = error
        with self.world.changed:
            self.world.kill(self.name)

    def reaches(self, step: int) -> None:
        with self.world.changed:
            reached = self.world.changed.wait_for(lambda: self.replicas.step >= step or self.error is not None, 20.0)
        assert reached, self.error
        assert self.error is None


@pytest.mark.filterwarnings("ignore:turned away")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"index": 1, "begins_at": 1}, "index 1 is in the run already"),
        ({"index": 3}, "index 3 is too high for max_replicas=3"),
        ({"index": 2, "run": "other"}, "run 'other', and has met replicas of run ''"),
        # Ahead of the run, so that torchft would let the run heal from it.
        ({"index": 2, "run": "other", "begins_at": 10**6}, "belongs to another run"),
        ({"index": 1, "begins_at": 10**6}, "index 1 is in the run already"),
    ],
)
def test_a_stranger_is_turned_away_and_the_run_goes_on(arguments: dict[str, Any], words: str) -> None:
    world = World(0, 0.0, 0.0)
    run = [Living(world, index) for index in (0, 1)]
    run[0].reaches(5)
    stranger = Living(world, **arguments)
    stranger.thread.join(20.0)
    assert isinstance(stranger.error, StrangerError)
    assert words in str(stranger.error)
    after = run[0].replicas.step
    assert after < 10**6
    for living in run:
        living.reaches(after + 5)
    assert [living.replicas.members for living in run] == [[0, 1], [0, 1]]
    for living in run:
        living.last = run[0].replicas.step + 3
    for living in run:
        living.thread.join(20.0)
    assert [living.error for living in run] == [None, None]


def test_who_leaves_takes_part_until_it_is_forgotten_and_no_step_fails() -> None:
    world = World(0, 0.0, 0.0)
    run = [Living(world, index) for index in (0, 1, 2)]
    for living in run:
        living.replicas._departure.seconds = 0.02
    run[0].reaches(5)
    run[1].replicas.leave(7)
    run[1].thread.join(20.0)
    assert isinstance(run[1].error, SystemExit)
    assert run[1].error.code == 7
    left = run[1].replicas.step
    run[0].reaches(left + 5)
    run[2].reaches(left + 5)
    for living in (run[0], run[2]):
        living.last = run[0].replicas.step + 100
    for living in (run[0], run[2]):
        living.thread.join(20.0)
        assert living.error is None
        assert living.replicas.members == [0, 2]
        assert living.replicas.aborts == 0


def test_where_all_leave_at_once_they_end_behind_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[dict[str, Any]] = []
    monkeypatch.setattr(_launched, "note_progress", lambda **changes: noted.append(changes))
    world = World(0, 0.0, 0.0)
    run = [Living(world, index, leaves_behind=10) for index in (0, 1)]
    for living in run:
        living.thread.join(20.0)
        assert isinstance(living.error, SystemExit)
        assert living.error.code == 7
        assert living.replicas.step == 10
        assert living.replicas.aborts == 0
    assert world.silent == set()
    assert noted.count({"left": True}) == 2


def alone(missed: int | None) -> Replicas:
    """A replica that has made a step with another one, and now gets a quorum without it."""
    world = World(0, 0.0, 0.0)
    handover = Handover(dict, print, "")
    manager: Any = Manager(world, "0:", handover.give, handover.take)
    replicas = Replicas(0, 2, manager, LIMITS, 0, lambda: 0, handover)
    replicas.begin()
    manager.quorum_names, replicas.members = ["0:", "1:"], [0, 1]
    replicas._left_behind.remember(["1:"])
    world.previous = []
    manager.missed_quorums = missed
    return replicas


def test_who_slept_through_the_end_does_not_go_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeftBehindError, match=r"former members \[0, 1\] is there after step 0"):
        alone(missed=1).begin()
    finished = tmp_path / "finished"
    finished.touch()
    monkeypatch.setenv(_launched.FINISHED, str(finished))
    with pytest.raises(SystemExit) as ended:
        alone(missed=1).begin()
    assert ended.value.code == 0


def test_who_has_seen_the_others_die_goes_on() -> None:
    replicas = alone(missed=0)
    replicas.begin()
    assert replicas.members == [0]


def test_quorums_that_were_missed() -> None:
    now: dict[str, Any] = {}
    client = _Client(SimpleNamespace(_quorum=lambda: SimpleNamespace(max_step=0, **now)))
    missed = []
    for number, names in ((4, "ab"), (4, "ab"), (5, "abc"), (7, "a"), (8, "a")):
        now.update(quorum_id=number, replica_ids=list(names))
        client._quorum()
        missed.append(client.missed)
    assert missed == [0, 0, 0, 1, 1]
    now.update(quorum_id=1, replica_ids=["a"])  # of a lighthouse that was started again
    client._quorum()
    assert client.missed is None


def test_the_loss_of_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_launched.PROGRESS, str(tmp_path / "0"))
    Progress(step=3, furthest=57).write(tmp_path / "1")
    (tmp_path / "2").write_text(json.dumps({"no": "progress"}))
    world = World(0, 0.0, 0.0)
    handover = Handover(dict, print, "")
    manager: Any = Manager(world, "0:", handover.give, handover.take)
    replicas = Replicas(0, 3, manager, LIMITS, 0, lambda: 0, handover)
    with pytest.warns(RuntimeWarning, match=r"had come to step 57, and nobody is left .* begins again at step 0"):
        assert replicas.begin()
