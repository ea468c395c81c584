"""Copies of nested containers in host memory that is used again and again."""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.dtensor import local

BUFFERS = 2
_LARGE = 128 * 1024  # bytes, from where torch copies with several threads


def copy_into(copy: Tensor, source: Tensor) -> None:
    """Copy a tensor to one in host memory of the same form; from a GPU, behind the work so far.

    Within the host it is one thread that copies, unless torch has more than two. A second one adds little where memory
    is what limits it, and OpenMP's threads wait for each other at each tensor: for a while, where the thread that
    writes the checkpoint before has their core.
    """
    if (
        torch.get_num_threads() > 2
        or source.device.type != "cpu"
        or source.nbytes < _LARGE
        or not (source.is_contiguous() and copy.is_contiguous())
        or source.is_conj()
        or source.is_neg()
    ):
        copy.copy_(source, non_blocking=source.is_cuda)
    else:
        numpy.copyto(_as_bytes(copy), _as_bytes(source))


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
        copied = self._copy(content, before, {})
        if any(local(buffer).is_pinned() for buffer in self._kept):
            self._event = torch.accelerator.current_stream().record_event()
        return copied

    def wait(self) -> None:
        """Until all of it is copied; in the thread that writes it."""
        event, self._event = self._event, None
        if event is not None:
            event.synchronize()

    def _copy(self, value: Any, before: Iterator[Tensor], done: dict[int, Tensor]) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(entry, before, done) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry, before, done) for entry in value)
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            return copy.deepcopy(value)
        if id(value) not in done:  # else it is a tied one, which is written once
            buffer = next(before, None)
            if buffer is None or _form(buffer) != _form(value):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            with torch.no_grad():
                copy_into(local(buffer), local(value))
            self._kept.append(buffer)
            done[id(value)] = buffer
        return done[id(value)]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    form = (type(tensor.detach()), tensor.shape, tensor.stride(), tensor.dtype)
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
