"""The memory of this process, where Linux says it, elsewhere NaN; what a forward pass keeps, and a call holds."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def kept_bytes(forward: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """Of all storages that autograd saves while ``forward`` runs, each once, but those of ``without``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found: dict[int, int] = {}
    alive = []  # an address is not given out again while its tensor lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(found.values())


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that the CPU's allocator holds during a call beyond what it held before, by its own count."""
    gc.collect()  # what is freed meanwhile would count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
