"""Copies of nested containers in host memory that is used again and again."""

from __future__ import annotations

import copy
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.dtensor import local

BUFFERS = 2
_THREADS = 8
_PIECE = 8 * 1024 * 1024  # bytes
_SMALL = 128 * 1024  # bytes, below which torch copies with one thread


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors to others in host memory of the same form; from a GPU, behind the work so far.

    Within the host by as many threads as torch has, up to eight, of which each takes the next piece when it is free.
    Where a core is somebody else's for a while, as that of the thread that writes the checkpoint before, the others do
    its part: torch's own threads would wait for the last of them at each tensor.

    Args:
        pairs: the copy, and what is copied.
    """
    pieces: deque[tuple[Any, Any]] = deque()
    for target, source in pairs:
        if source.device.type != "cpu" or source.nbytes < _SMALL or not (_is_plain(target) and _is_plain(source)):
            target.copy_(source, non_blocking=source.is_cuda)
            continue
        into, of = _as_bytes(target), _as_bytes(source)
        pieces.extend((into[at : at + _PIECE], of[at : at + _PIECE]) for at in range(0, len(of), _PIECE))

    def work() -> None:
        with suppress(IndexError):  # none is left
            while True:
                numpy.copyto(*pieces.popleft())

    count = min(_THREADS, torch.get_num_threads(), len(pieces))
    others = [threading.Thread(target=work, daemon=True) for _ in range(count - 1)]
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.detach().view(-1).view(torch.uint8).numpy()


class Buffers:
    """Host memory for the tensors of one copy, pinned for those of a GPU, and kept for a later copy."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._event: Any = None

    def copy(self, content: Any) -> Any:
        """A copy of nested dicts, lists and tuples that nobody else changes; a tensor that is sharded stays so.

        What comes from a GPU is copied behind the work so far and before all that comes: `wait` before it is read.
        """
        before, self._kept = iter(self._kept), []
        pairs: list[tuple[Tensor, Tensor]] = []
        copied = self._copy(content, before, {}, pairs)
        with torch.no_grad():
            copy_all(pairs)
        if any(local(buffer).is_pinned() for buffer in self._kept):
            self._event = torch.accelerator.current_stream().record_event()
        return copied

    def wait(self) -> None:
        """Until all of it is copied; in the thread that writes it."""
        event, self._event = self._event, None
        if event is not None:
            event.synchronize()

    def _copy(
        self, value: Any, before: Iterator[Tensor], done: dict[int, Tensor], pairs: list[tuple[Tensor, Tensor]]
    ) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(entry, before, done, pairs) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry, before, done, pairs) for entry in value)
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            return copy.deepcopy(value)
        if id(value) not in done:  # else it is a tied one, which is written once
            buffer = next(before, None)
            if buffer is None or _form(buffer) != _form(value):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            pairs.append((local(buffer), local(value)))
            self._kept.append(buffer)
            done[id(value)] = buffer
        return done[id(value)]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    # Not of what `detach` gives, which of a DTensor goes through its dispatch.
    kind = Tensor if type(tensor) is nn.Parameter else type(tensor)
    form = (kind, tensor.shape, tensor.stride(), tensor.dtype)
    return (*form, tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else form  # type: ignore[attr-defined]


class Turns:
    """``BUFFERS`` of them by turns: one is written while the next one is filled, and whoever comes then waits."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(Buffers())

    @property
    def busy(self) -> bool:
        """Whether all of them are still to be written."""
        return self._free.empty()

    def take(self) -> Buffers:
        """One to fill; waits for it."""
        return self._free.get()

    def give_back(self, buffers: Buffers) -> None:
        """It is written."""
        self._free.put(buffers)
