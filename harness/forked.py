"""Ranks as forks of this process: they start at once, since all is imported, and each may be stopped or killed.

For processes that have done nothing yet but importing, a script's or a test's child: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from harness.processes import eventually, free_port


class ForkedRanks:
    """Calls a function in ``ranks`` processes, each with torchrun's variables; a context manager that ends them.

    What they print is in ``<folder>/rank<n>.log``.
    """

    def __init__(self, ranks: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> None:
        self.folder = folder
        self.status: dict[int, int | None] = dict.fromkeys(range(ranks))
        """Exit status of each rank, negative for a signal; None while it runs."""
        port = free_port()
        self.pids = [self._fork(rank, ranks, port, function, arguments) for rank in range(ranks)]

    def _fork(self, rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "forked"},
                **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            }
            function(*arguments)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def text(self, rank: int | None = None) -> str:
        """What a rank, or all of them, have printed so far."""
        ranks = self.status if rank is None else [rank]
        files = [self.folder / f"rank{each}.log" for each in ranks]
        return "".join(file.read_text() for file in files if file.exists())

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if self.status[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.status[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank, status in self.status.items() if status is None]

    def wait(self, seconds: float = 90.0, stopped: Collection[int] = ()) -> dict[int, int | None]:
        """Until all have ended, but those that are stopped; the exit status of each."""
        deadline = time.monotonic() + seconds
        while set(self.running()) - set(stopped):
            if time.monotonic() > deadline:
                raise AssertionError(f"still running: {self.running()}\n{self.text()}")
            time.sleep(0.02)
        return self.status

    def __enter__(self) -> ForkedRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.running():
            for number in (signal.SIGKILL, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)
        eventually(lambda: not self.running(), 20.0, "killed ranks are still there")
