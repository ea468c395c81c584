"""Copies of a checkpoint in host memory that is used again and again."""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, UntypedStorage

from lightning_eff.plugins.async_checkpoint.checkpoint_file import take_apart
from lightning_eff.plugins.async_checkpoint.copies import Copies
from lightning_eff.plugins.async_checkpoint.overlap import Overlap

BUFFERS = 2
_ALIGNMENT = 64
_PIECE = 16 * 1024 * 1024


class Arena:
    """One piece of host memory, pinned where it is copied to from a GPU.

    In memory that has been written before, a copy takes a fifth of the time of the first one: `touch` is that first
    one. It is shared with processes that are forked (workers of a loader), so that none of it is copied when it is
    written again.
    """

    def __init__(self) -> None:
        self.size = 0
        self.pinned = False
        self._memory: Tensor | None = None

    def fits(self, size: int, pinned: bool) -> bool:
        """Whether so many bytes have room."""
        return self.size >= size and self.pinned >= pinned

    def reserve(self, size: int, pinned: bool) -> None:
        """Have room for so many bytes; what was in it is lost."""
        if self.fits(size, pinned) or size == 0:
            return
        self._memory, self.size = None, 0  # the old memory goes first
        if pinned:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            self._memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        self.size, self.pinned = size, pinned

    def touch(self, wanted: Callable[[], bool] = lambda: False) -> None:
        """Let the system provide the memory now; other threads go on meanwhile. Ends early when it is ``wanted``."""
        for begin in range(0, self.size, _PIECE):
            if wanted():
                return
            self.part(begin, _PIECE).numpy().fill(0)

    def part(self, begin: int, size: int) -> Tensor:
        """Bytes of it."""
        assert self._memory is not None
        return self._memory[begin : begin + size]


class Staged:
    """One checkpoint, copied or about to be; its arena is free again after `release`."""

    def __init__(
        self, pickled: bytes, storages: Sequence[UntypedStorage], arena: Arena, overlap: Overlap | None
    ) -> None:
        self.pickled = pickled
        self.size = sum(storage.nbytes() for storage in storages)
        self._arena = arena
        self._sizes = [storage.nbytes() for storage in storages]
        self._sources = storages  # held, so that no memory is given away before it is read
        offsets, end = [], 0
        for size in self._sizes:
            offsets.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._offsets = offsets
        arena.reserve(end, pinned=any(storage.device.type == "cuda" for storage in storages))
        with torch.no_grad(), torch.inference_mode(False):
            places = zip(storages, offsets, self._sizes, strict=True)
            self._copies = Copies([(arena.part(at, size), _whole(of)) for of, at, size in places if size], overlap)

    def settle(self) -> None:
        """The weights may be written after this."""
        self._copies.settle()

    def wait(self) -> None:
        """Until all of it is copied."""
        self._copies.wait()
        self._sources = ()

    def contents(self) -> list[memoryview]:
        """The bytes of each storage; waits until they are there, and raises where they are not of one moment."""
        self._copies.check()
        parts = zip(self._offsets, self._sizes, strict=True)
        return [memoryview(_bytes(self._arena, offset, size)) for offset, size in parts]


def _whole(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes(arena: Arena, offset: int, size: int) -> Any:
    return arena.part(offset, size).numpy() if size else numpy.empty(0, dtype=numpy.uint8)


class Stager:
    """Copies checkpoints into ``BUFFERS`` arenas; a save waits while all of them are being written."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Arena] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(Arena())
        self._buffers = BUFFERS
        self._wanted = threading.Event()  # somebody waits for an arena
        self._in_use: set[Staged] = set()
        self._latest: Staged | None = None

    @property
    def busy(self) -> bool:
        """Whether a save would have to wait until an earlier one is written."""
        return len(self._in_use) >= self._buffers

    def stage(self, checkpoint: Any, overlap: Overlap | None = None) -> Staged:
        """Copy a checkpoint.

        Args:
            checkpoint: anything that can be pickled.
            overlap: what is left alone until `settle`, and copied meanwhile.
        """
        self.settle()
        pickled, storages = take_apart(checkpoint)
        if self._free.empty():
            self._wanted.set()
        arena = self._free.get()
        try:
            self._latest = staged = Staged(pickled, storages, arena, overlap)
        except BaseException:
            self._free.put(arena)
            raise
        self._in_use.add(staged)
        return staged

    def settle(self) -> None:
        """Weights and optimizer state are about to be written."""
        if self._latest is not None:
            self._latest.settle()
            self._latest = None  # behind it: one that is interrupted is not settled

    def release(self, staged: Staged) -> None:
        """Its bytes are not needed any more; they may not even have come, if its file could not be opened."""
        try:
            staged.wait()
        finally:
            self._in_use.discard(staged)
            self._free.put(staged._arena)

    def take_idle(self, buffers: int) -> list[Arena]:
        """Arenas that nobody uses, for `warm`; a save waits until they are back. So many are kept, the others go."""
        idle: list[Arena] = []
        self._wanted.clear()
        while not self._free.empty():
            idle.append(self._free.get())
        kept = max(0, buffers - len(self._in_use))
        self._buffers = min(BUFFERS, len(self._in_use) + kept)
        return idle[:kept]

    def warm(self, arenas: Sequence[Arena], size: int, pinned: bool) -> None:
        """Have the memory before the first save needs it; in a thread of its own. A save that comes soon ends it."""
        for arena in arenas:
            try:
                arena.reserve(size, pinned)
                arena.touch(self._wanted.is_set)
            finally:
                self._wanted.clear()
                self._free.put(arena)
