"""A sliding window of snapshots of a model, in host memory, on disk or on the model's device."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Place = Literal["cpu", "disk", "model"]

_PIECE = 1 << 26
"""Bytes of memory that small tensors share: 64 MiB."""


class SnapshotWindow:
    """The last snapshots of named tensors; real copies, never aliases.

    Taking one does not wait: copies from a GPU go into pinned memory behind the step that has made the weights, and
    are waited for where the window is read. On disk a snapshot is mapped files without a name, which the system
    writes when it has time and frees when the process ends, however it ends. A full window writes into its oldest.

    In host memory and on disk the tensors of a snapshot lie side by side in a few pieces: each of its own would be a
    mapping of its own on disk, and pinned it would take up to twice its size.

    Args:
        length: snapshots that are kept, >= 1.
        place: ``"cpu"`` (host memory), ``"disk"``, or ``"model"`` (where the tensors are).

    Example:
        >>> weight = torch.zeros(2)
        >>> window = SnapshotWindow(2)
        >>> for step in (1, 2, 3):
        ...     weight += 1
        ...     window.take(step, {"weight": weight})
        >>> window.steps, [snapshot["weight"].tolist() for snapshot in window.read()]
        ([2, 3], [[2.0, 2.0], [3.0, 3.0]])
    """

    def __init__(self, length: int, place: Place = "cpu") -> None:
        self.length = length
        self.place: Place = place
        self.folder: str | None = None
        """Where ``"disk"`` is; None: the system's folder for temporary files."""
        self.steps: list[int] = []
        self._snapshots: list[dict[str, Tensor]] = []
        self._spare: list[dict[str, Tensor]] = []  # memory of snapshots that are no longer kept
        self._held: weakref.WeakSet[HeldWindow] = weakref.WeakSet()
        self._copied: Any = None  # a CUDA event behind the latest copies

    def take(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, in place of the oldest snapshot if the window is full."""
        slot: dict[str, Tensor] = {}
        if len(self.steps) == self.length:
            slot = self._snapshots.pop(0)
            self.steps.pop(0)
        elif self._spare:
            slot = self._spare.pop()
        used = [*self._snapshots, *(snapshot for held in self._held for snapshot in held.snapshots)]
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            memory = {}
            for name, tensor in tensors.items():
                old = slot.get(name)
                fits = old is not None and (old.shape, old.dtype) == (tensor.shape, tensor.dtype)
                if old is not None and fits and not any(other.get(name) is old for other in used):
                    memory[name] = old  # nobody else has it, see `add` and `hold`
            memory |= self._allocate({name: tensor for name, tensor in tensors.items() if name not in memory})
            snapshot = {name: memory[name].copy_(tensor, non_blocking=True) for name, tensor in tensors.items()}
        self._snapshots.append(snapshot)
        self.steps.append(step)
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if self.place != "model" and device is not None:
            self._copied = torch.cuda.current_stream(device).record_event()

    def read(self) -> list[dict[str, Tensor]]:
        """The snapshots, oldest first; not to be changed."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._snapshots

    def add(self, name: str, tensor: Tensor) -> None:
        """Give every snapshot a tensor that has not changed since the first of them, held once."""
        if self._snapshots:
            with torch.inference_mode(False), torch.no_grad():
                copy = self._allocate({name: tensor})[name].copy_(tensor)
            for snapshot in self._snapshots:
                snapshot[name] = copy

    def rename(self, renamed: Mapping[str, str], gone: Set[str]) -> None:
        """Call tensors by new names, given by their old ones, and forget those that are gone."""
        self._snapshots = [
            {renamed.get(name, name): tensor for name, tensor in snapshot.items() if name not in gone}
            for snapshot in self._snapshots
        ]

    def clear(self) -> None:
        """Forget all snapshots."""
        self.steps, self._snapshots, self._spare, self._copied = [], [], [], None

    def drop_after(self, step: int) -> None:
        """Forget the snapshots that are newer than ``step``; their memory is for the next ones."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            self._spare.append(self._snapshots.pop())

    def hold(self) -> HeldWindow:
        """The window as it is now, for `go_back`: no copy, but as long as it lives, its memory is not written again."""
        held = HeldWindow(list(self.steps), [dict(snapshot) for snapshot in self._snapshots], self._copied)
        self._held.add(held)
        return held

    def go_back(self, held: HeldWindow) -> None:
        """Be what the window was when it was held."""
        self.steps = list(held.steps)
        self._snapshots = [dict(snapshot) for snapshot in held.snapshots]

    def state_dict(self) -> dict[str, Any]:
        """Steps and tensors, the window's own: to be saved, not to be kept."""
        return {"steps": list(self.steps), "snapshots": list(self.read())}

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> bool:
        """Take saved snapshots, as many as the window holds; False, and none, if they do not fit ``like``."""
        self.clear()
        for step, snapshot in zip(state["steps"][-self.length :], state["snapshots"][-self.length :], strict=True):
            if any(name not in like or like[name].shape != tensor.shape for name, tensor in snapshot.items()):
                self.clear()
                return False
            self.take(step, {name: tensor.to(like[name].dtype) for name, tensor in snapshot.items()})
            if self.place == "model":
                self._snapshots[-1] = {name: t.to(like[name].device) for name, t in self._snapshots[-1].items()}
        return True

    def __getstate__(self) -> dict[str, Any]:
        memo: dict[int, Tensor] = {}  # what is held once stays so; and each view would be pickled with all of its piece
        snapshots = [
            {name: memo.setdefault(id(tensor), tensor.clone()) for name, tensor in snapshot.items()}
            for snapshot in self.read()  # which waits: an event cannot be pickled
        ]
        return {**vars(self), "_snapshots": snapshots, "_held": (), "_spare": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _held=weakref.WeakSet())

    def _allocate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for the values of each tensor; not written yet."""
        if self.place == "model":
            contiguous = torch.contiguous_format
            return {name: torch.empty_like(tensor, memory_format=contiguous) for name, tensor in tensors.items()}
        memory = {}
        for names in _pieces(tensors):
            first = tensors[names[0]]
            counts = [tensors[name].numel() for name in names]
            piece = self._piece(sum(counts), first.dtype, pinned=first.is_cuda)
            for name, part in zip(names, torch.split(piece, counts), strict=True):
                memory[name] = part.view(tensors[name].shape)
        return memory

    def _piece(self, numel: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        if self.place == "cpu" or numel == 0:
            return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=pinned)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=".snapshot-", dir=self.folder)
        os.close(descriptor)
        try:
            return torch.from_file(path, shared=True, size=numel, dtype=dtype)
        finally:
            os.unlink(path)  # the mapping holds on to the file, so that a killed process leaves none behind

    def bytes_of(self, tensors: Mapping[str, Tensor]) -> int:
        """What one snapshot of such tensors takes in the window's place."""
        if self.place == "model":
            return sum(tensor.nbytes for tensor in tensors.values())
        taken = 0
        for names in _pieces(tensors):
            size = sum(tensors[name].nbytes for name in names)
            taken += _power_of_two(size) if self.place == "cpu" and tensors[names[0]].is_cuda else size
        return taken

    def free_bytes(self, device: torch.device) -> int | None:
        """What is free in the window's place now; None where it cannot be known."""
        if self.place == "disk":
            folder = Path(self.folder or tempfile.gettempdir()).absolute()
            while not folder.exists():
                folder = folder.parent
            return shutil.disk_usage(folder).free
        if self.place == "model" and device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0])
        if self.place == "model" and device.type != "cpu":
            return None
        return free_host_memory()


@dataclass(eq=False)
class HeldWindow:
    """What a window was at some time; copies of it are the same one."""

    steps: list[int]
    snapshots: list[dict[str, Tensor]]
    copied: Any = None

    def state_dict(self) -> dict[str, Any]:
        """As that of the window; waits until the snapshots are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return {"steps": list(self.steps), "snapshots": list(self.snapshots)}

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldWindow:
        return self


def _pieces(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the tensors that share a piece of memory: those of one dtype, as many as fill it.

    The host allocator rounds each piece of pinned memory up to a power of two, so the largest tensors come first, and
    smaller ones fill what they leave. One dtype, since ``torch.save`` refuses a memory that is viewed as two.
    """
    pieces: list[list[str]] = []
    rooms: dict[tuple[torch.dtype, bool], dict[int, int]] = {}  # bytes that are left in the pieces
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
        tensor = tensors[name]
        size, alike = tensor.nbytes, rooms.setdefault((tensor.dtype, tensor.is_cuda), {})
        index = next((index for index, room in alike.items() if size <= room), None)
        if index is None:
            index = len(pieces)
            pieces.append([])
            alike[index] = max(_PIECE, _power_of_two(size))
        alike[index] -= size
        pieces[index].append(name)
    return pieces


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def free_host_memory() -> int | None:
    """What the system says is available, within the limit of this process's container."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()) + _reclaimable())
    except (OSError, ValueError, IndexError):
        pass  # no Linux, or another version of control groups
    return min(free) if free else None


def _reclaimable() -> int:
    """Files that are cached count as used memory in a container, and go when they must."""
    for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
