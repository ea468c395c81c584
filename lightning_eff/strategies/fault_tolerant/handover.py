"""The state of a run on its way from one replica to another, with what tells whether it is the right run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_eff.strategies.fault_tolerant.rendezvous import StrangerError


class Handover:
    """Gives this replica's state to those that have to catch up, and takes a peer's.

    torchft takes whoever has made most steps for the one that is ahead. That may be a stranger: a replica of another
    run, or one that has begun from a later checkpoint. Who has made steps in this run takes nothing from it.

    Args:
        state: the state of this replica.
        load: takes a peer's.
        run: the id of the run.
    """

    def __init__(self, state: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None], run: str) -> None:
        self.run = run
        self.veteran = False
        """Whether this replica has made steps in the run."""
        self.refused = False
        """Whether a stranger's state has been left alone; for whoever has asked for the quorum to look at."""
        self._state = state
        self._load = load

    def give(self) -> dict[str, Any]:
        """For a peer."""
        return {"run": self.run, "veteran": self.veteran, "state": self._state()}

    def take(self, given: dict[str, Any]) -> None:
        """From a peer.

        Raises:
            StrangerError: it is of another run, or of another model.
        """
        if self.veteran and (given["run"] != self.run or not given["veteran"]):
            self.refused = True
            return
        if given["run"] != self.run:
            raise StrangerError(
                f"this replica is of run {self.run!r}, and has met replicas of run {given['run']!r}: give each run a "
                "lighthouse"
            )
        try:
            self._load(given["state"])
        except Exception as error:
            raise StrangerError(
                f"the state of the run that this replica comes into does not fit here ({error}): is it the same script "
                "with the same arguments?"
            ) from error
