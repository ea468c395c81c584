"""How quorums are numbered."""

from __future__ import annotations

import logging
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff.strategies.fault_tolerant.manager import _Client


class Lighthouse:
    """Gives every client that asks the quorum of this moment."""

    def __init__(self) -> None:
        self.now: tuple[int, int, list[str]] = (0, 0, [])

    def _quorum(self, **_: Any) -> Any:
        number, step, names = self.now
        return SimpleNamespace(quorum_id=number, max_step=step, replica_ids=names, heal=False)


def test_a_lighthouse_that_counts_from_one_again() -> None:
    """Its quorum 1 is not taken for the first one, whose members' addresses are still in the store."""
    lighthouse = Lighthouse()
    first, second = _Client(lighthouse), _Client(lighthouse)

    def numbers(quorum: int, step: int, *names: str) -> list[int]:
        lighthouse.now = quorum, step, list(names)
        clients = {"a": first, "b": second}
        return [clients[name]._quorum(group_rank=0).quorum_id for name in names]

    (alone,) = numbers(1, 0, "a")
    together = numbers(2, 0, "a", "b")
    assert numbers(2, 1, "a", "b") == together  # nothing has changed: the connections stay
    assert together[0] == together[1]
    # The lighthouse is started again, after step 9.
    (again,) = numbers(1, 9, "b")
    kept, later = numbers(2, 9, "a", "b")
    assert alone < together[0] < again < later
    # One that was in none of those between cannot know; the other does not reach it, and that makes a new quorum.
    assert kept == together[0]
    assert len({*numbers(3, 9, "a", "b"), later}) == 2
    assert not first._quorum().heal  # all else is as it was


def test_the_rest_is_the_clients() -> None:
    assert _Client(SimpleNamespace(checkpoint=lambda: True)).checkpoint()


def test_torchft_is_quiet_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    """It writes a traceback for each error that is handled here, and a warning at each quorum."""
    logger = logging.getLogger("torchft.manager")
    logger.warning("Unable to reset NCCL flight recorder")
    logger.error("a traceback")
    assert caplog.records == []
    with caplog.at_level(logging.INFO, "torchft.manager"):
        logger.warning("wanted")
    assert [record.message for record in caplog.records] == ["wanted"]


def test_who_leaves_votes_by_itself() -> None:
    """Its manager is gone by then, which sends the heartbeats."""

    def gone(*_: Any, **__: Any) -> bool:
        raise ConnectionError

    client = _Client(SimpleNamespace(should_commit=gone))
    client.silent = True
    assert [client.should_commit(0, 7, vote, timeout=timedelta(seconds=1)) for vote in (True, False)] == [True, False]
