"""The phase that a process was in when it was stopped, for others on the same machine to read.

A few bytes of memory that the kernel keeps as a file without a name: a stopped process cannot answer, but its memory is
there. Linux only; elsewhere the others know what they were last told.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import suppress

from lightning_eff.callbacks.run_health.phases import Phases

_SIZE = 16  # bytes: the phase, and from the ninth on the step


class LastPlace:
    """Lets the clock write where it is into shared memory.

    Attributes:
        descriptor: by which others find it, see ``of``; -1 where there is none.
    """

    def __init__(self, phases: Phases) -> None:
        self.descriptor = -1
        self._phases = phases
        if hasattr(os, "memfd_create"):
            with suppress(OSError):
                self.descriptor = os.memfd_create("run_health")
                os.ftruncate(self.descriptor, _SIZE)
                phases.cell = mmap.mmap(self.descriptor, _SIZE)

    @staticmethod
    def of(pid: int, descriptor: int) -> tuple[int, int] | None:
        """Step and phase of another process; None if it cannot be read."""
        with suppress(OSError, ValueError):
            with open(f"/proc/{pid}/fd/{descriptor}", "rb") as file:
                data = file.read(_SIZE)
            if len(data) == _SIZE:
                return struct.unpack_from("<q", data, 8)[0], data[0]
        return None

    def close(self) -> None:
        """The memory is given back."""
        if self.descriptor >= 0:
            cell, self._phases.cell = self._phases.cell, bytearray(_SIZE)
            if isinstance(cell, mmap.mmap):
                cell.close()
            os.close(self.descriptor)
            self.descriptor = -1
