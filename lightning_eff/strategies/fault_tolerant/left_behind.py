"""Whether the others have gone on without this replica while it waits for them, or while it did not run at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_eff.strategies.fault_tolerant.manager import note_of

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
        self.peers: list[str] = []
        """Addresses of the others' managers since the last rendezvous."""
        self.found = False
        """Whether a former member is in a later quorum without this replica: it gets none any more where it stands."""

    @contextmanager
    def watching(self, wanted: bool) -> Iterator[None]:
        """While this replica waits for a quorum: it is broken off when the others have gone on."""
        if not wanted or not self.peers:
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
        while not over.wait(self.patience):
            if any(self._went_on(address) for address in self.peers):
                self.found = True
                self.manager.break_off()
                return

    def _went_on(self, address: str) -> bool:
        note = note_of(address, 2.0)
        if note is None:
            return False
        quorum, _, members = note.partition(" ")
        return int(quorum) > self.manager.quorum_id and str(self.index) not in members.split(",")
