"""Whether the others have gone on without this replica while it waits for them, or while it did not run at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_eff.strategies.fault_tolerant.manager import note_of
from lightning_eff.strategies.fault_tolerant.rendezvous import LeftBehindError
from lightning_eff.strategies.fault_tolerant.start import leave_if_over

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.manager import QuorumManager


class LeftBehind:
    """Looks after a replica that waits within a step or an operation, where no newcomers are let in.

    Args:
        manager: of this replica.
        index: of this replica.
        patience: seconds between two looks.
    """

    def __init__(self, manager: QuorumManager, index: int, patience: float) -> None:
        self.manager = manager
        self.index = index
        self.patience = patience
        self._peers: list[str] = []
        self._names: set[str] = set()
        self._alone_since: float | None = None
        self.found = False
        """Whether this replica gets no quorum any more where it stands: a former member is in a later one without it,
        or none of them answers.
        """

    def remember(self, peers: list[str]) -> None:
        """After a rendezvous.

        Args:
            peers: addresses of the others' managers.
        """
        self._peers = peers
        self._names = set(self.manager.quorum_names) - {self.manager.name}
        self._alone_since = None

    def is_alone(self, members: list[int], step: int) -> bool:
        """Whether this replica has a quorum with none of the former members, and it is not known that they are dead.

        It may have been asleep while they came to the end of the run, or cut off: then the lighthouse has formed
        quorums without it. For the end all members are needed, so that those who end well do not do so between two
        quorums of this replica.

        Args:
            members: indices of the former members.
            step: of this replica.

        Returns:
            True if it is to ask once more: the lighthouse was started again, and they may still come to it.

        Raises:
            SystemExit: the run is over.
            LeftBehindError: they have gone on without it.
        """
        missed = self.manager.missed_quorums
        if not self._names or self._names & set(self.manager.quorum_names) or missed == 0:
            return False
        leave_if_over()
        self._alone_since = self._alone_since or time.monotonic()
        if missed is None and time.monotonic() - self._alone_since < self.patience:
            return True
        raise LeftBehindError(
            f"none of the former members {members} is there after step {step}, and they have gone on without replica "
            f"{self.index}, which may have been stopped or cut off; start anew"
        )

    @contextmanager
    def watching(self, wanted: bool) -> Iterator[None]:
        """While this replica waits for a quorum: it is broken off when the others have gone on."""
        if not wanted or not self._peers:
            yield
            return
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True, name="left-behind")
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch(self, over: threading.Event) -> None:
        unanswered = 0
        while not over.wait(self.patience):
            notes = [note_of(address, 2.0) for address in self._peers]
            # Where all have died, those who are left have a quorum by now: unless the others had one without this one.
            unanswered = unanswered + 1 if not any(notes) else 0
            if any(self._went_on(note) for note in notes) or unanswered == 2:
                self.found = True
                self.manager.break_off()
                return

    def _went_on(self, note: str | None) -> bool:
        if not note:
            return False
        quorum, _, members = note.partition(" ")
        return int(quorum) > self.manager.quorum_id and str(self.index) not in members.split(",")
