"""Heartbeats to the lighthouse in the name of replicas that are known to live, so that a short silence means death.

A replica's own heartbeats may be late on a loaded machine. With these beside them the lighthouse can take half a second
of silence for a death: a process that has ended, or was stopped, is seen here at once, and gets none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_eff._launched import Progress
from lightning_eff.cli.lighthouse import load_torchft

_EVERY = 0.1  # seconds
_NO_STEP = 5.0  # seconds without a step after which a process may hang: then its own heartbeats have to do
_LIMIT = timedelta(seconds=1)  # for one call


class Heartbeats:
    """A thread that beats for each replica of this machine.

    Args:
        lighthouse: its address, ``http://HOST:PORT``.
        progress: the files of the replicas, see `_launched.Progress`.
    """

    def __init__(self, lighthouse: str, progress: Sequence[Path]) -> None:
        self.lighthouse = lighthouse
        self.progress = progress
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeats")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """No more heartbeats; a call to the lighthouse that hangs is left to itself."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(0.5)

    def _run(self) -> None:
        client: Any = None
        while not self._over.wait(_EVERY):
            client = self._beat(client)

    def _beat(self, client: Any) -> Any:
        """Once for each replica. The connection is kept for the next time, if there is one."""
        try:
            client = client or load_torchft().LighthouseClient(self.lighthouse, _LIMIT)
            for file in self.progress:
                replica = Progress.read(file)
                if replica.name and lives(replica.pid) and _is_recent(file):
                    client.heartbeat(replica.name, _LIMIT)
        except Exception:  # the lighthouse is not there, yet or for a moment
            return None
        return client


def lives(pid: int) -> bool:
    """Whether a process runs: it has not ended, and is not stopped."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZXTt"
    return False


def _is_recent(file: Path) -> bool:
    with suppress(OSError):
        return time.time() - file.stat().st_mtime < _NO_STEP
    return False
