"""The memory of this process, where Linux says it; elsewhere NaN."""

from __future__ import annotations

import math
from pathlib import Path

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Variables of a process whose memory goes back when it is freed, so that its peak is one of tensors. It takes time."""


def resident() -> float:
    """Bytes of memory that the process has now."""
    return _status("VmRSS")


def peak_resident() -> float:
    """The most bytes of memory that the process has had. (`ru_maxrss` would begin with that of its parent.)"""
    return _status("VmHWM")


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), math.nan)
