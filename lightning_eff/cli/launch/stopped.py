"""Says which process of a replica is stopped: it cannot say so itself, and to the others it looks dead."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

_EVERY = 0.5  # seconds
_STATES = {"T": "is stopped (SIGSTOP or Ctrl-Z)", "t": "is held by a debugger"}


class StoppedWatch:
    """A thread that looks at this process's children and prints when one is stopped, and when it goes on."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}
        self._strangers: set[int] = set()  # looked at once: who is not a child of this process does not become one
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stopped-watch")

    def __enter__(self) -> StoppedWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_EVERY):
            self.look()

    def look(self) -> None:
        """Once."""
        now = self._stopped()
        for pid in now.keys() - self._known.keys():
            _say(f"process {pid} {now[pid]}: the other replicas go on without it")
        for pid in self._known.keys() - now.keys():
            if Path(f"/proc/{pid}").exists():
                _say(f"process {pid} is no longer stopped")
        self._known = now

    def _stopped(self) -> dict[int, str]:
        """Process ids of this process's children that are stopped, and how, in words (Linux)."""
        found: dict[int, str] = {}
        with suppress(OSError):  # of another system
            there = {int(name) for name in os.listdir("/proc") if name.isdigit()}
            self._strangers &= there
            for pid in there - self._strangers:
                with suppress(OSError):  # it has ended
                    state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
                    if int(parent) != os.getpid():
                        self._strangers.add(pid)
                    elif state in _STATES:
                        found[pid] = _STATES[state]
        return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
