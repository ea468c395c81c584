"""How long a thread could have run and no core was free: what other work on its machine costs it.

Linux tells it of every thread. A rank that shares its cores is slow by what the system has preferred to it in a while,
which on a busy machine is much and changes by the second; a rank that is slow by itself is slow without it, too.
"""

from __future__ import annotations

import os
from contextlib import suppress


class Delay:
    """Of the thread that makes it; 0 where the system does not tell it."""

    def __init__(self) -> None:
        self._file = -1
        with suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> float:
        """Seconds since the thread began."""
        if self._file < 0:
            return 0.0
        return int(os.pread(self._file, 64, 0).split()[1]) / 1e9  # behind the nanoseconds that it has run

    def close(self) -> None:
        """The file is given back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
