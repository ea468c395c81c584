"""Copies of nested containers in host memory that is used again and again."""

from __future__ import annotations

import copy
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.plugins.async_checkpoint.overlap import Overlap, address, as_bytes, versions
from lightning_eff.training.dtensor import held

BUFFERS = 2
_THREADS = 8
_PIECE = 8 * 1024 * 1024  # bytes
_SMALL = 128 * 1024  # bytes, below which torch copies with one thread


class Copies:
    """Copies of tensors in host memory: of some while the training goes on, of all others at once.

    Args:
        pairs: the copy, and what is copied. From a GPU it is copied behind the work so far.
        overlap: which may be copied late. Whoever writes them calls ``settle`` before.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]], overlap: Overlap | None = None) -> None:
        allowed = {} if overlap is None else overlap.owners()
        now: list[tuple[Tensor, Tensor]] = []
        later: list[tuple[Tensor, Tensor]] = []
        owners: list[Tensor] = []
        for pair in pairs:
            owned = allowed.get(address(pair[1])) if _pays_late(pair[1]) else None
            (later if owned else now).append(pair)
            owners += owned or ()
        if overlap is not None and overlap.has_to_learn(later):
            now, later, owners = now + later, [], []
        self._overlap = overlap
        self._seen = versions(owners)
        self._written: int | None = None  # of those; None until the first settle or the end of the copies
        self._lock = threading.Lock()
        copy_all(now)
        devices = {source.device for _, source in now if source.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._late = copy_later(later)

    def settle(self) -> None:
        """What is copied late may be written after this."""
        for late in self._late:
            late.settle()
        self._look()

    def wait(self) -> None:
        """Until all of it is copied."""
        for event in self._events:
            event.synchronize()
        for late in self._late:
            late.wait()
        self._look()
        self._events = []

    def check(self) -> None:
        """Wait, and see whether the copies are whole and of one moment.

        Raises:
            RuntimeError: somebody has written what was copied late, or the copy was interrupted.
        """
        self.wait()
        if any(late.failed for late in self._late):
            raise RuntimeError("the copy of its weights was interrupted")
        if self._written:
            raise RuntimeError(
                f"{self._written} tensors of the weights or the optimizer state were written outside of an optimizer "
                "step while they were copied; they are copied at once from now on. Whoever writes them calls the hook "
                "before_weights_change first (lightning_eff.training.tell), or AsyncCheckpoint(overlap=False) copies "
                "everything at once"
            )

    def _look(self) -> None:
        with self._lock:  # else a step might begin while the thread that writes the file looks
            if self._written is None:
                self._written = 0 if self._overlap is None else self._overlap.leave_out(self._seen)
                self._seen = []


def _pays_late(source: Tensor) -> bool:
    return source.is_cuda or (source.device.type == "cpu" and source.nbytes >= _SMALL and _is_plain(source))


def copy_later(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
    """Begin to copy: from each GPU on a stream of its own, within the host in a thread. All have ``settle``, ``wait``.

    Args:
        pairs: the copy, and what is copied.
    """
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        by_device.setdefault(pair[1].device, []).append(pair)
    return [(StreamCopy if device.type == "cuda" else ThreadCopy)(some) for device, some in by_device.items()]


class StreamCopy:
    """Copies from a GPU on a stream of their own, while the stream of the training goes on."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.device = pairs[0][1].device
        self.failed = False
        self._pairs = pairs  # held until they are copied, whatever the training puts in their place
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for copy, source in pairs:
                copy.copy_(source, non_blocking=True)
        self._event = stream.record_event()

    def settle(self) -> None:
        """What the training's stream does from now on comes behind the copies; nothing waits on the host."""
        torch.cuda.current_stream(self.device).wait_event(self._event)

    def wait(self) -> None:
        """On the host, until the copies are there."""
        self._event.synchronize()
        self._pairs = ()


class ThreadCopy:
    """Copies within the host in a thread, while the training goes on."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.failed = False
        """Whether a piece may be missing."""
        self._pieces: deque[tuple[Any, Any]] = deque()
        self._thread = threading.Thread(target=self._work, args=(pairs,), name="checkpoint-copy", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Help, and wait until the copies are there."""
        self._work()
        self._thread.join()

    def wait(self) -> None:
        """Until the copies are there."""
        self._thread.join()

    def _work(self, pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        try:
            self._pieces.extend(_pieces(pairs))
            _work(self._pieces)
        except BaseException:  # an interrupt, between taking a piece and its end
            self.failed = True
            raise


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors to others in host memory of the same form; from a GPU, behind the work so far.

    Within the host by as many threads as torch has, up to eight, of which each takes the next piece when it is free.
    Where a core is somebody else's for a while, as that of the thread that writes the checkpoint before, the others do
    its part: torch's own threads would wait for the last of them at each tensor.

    Args:
        pairs: the copy, and what is copied.
    """
    large = []
    for target, source in pairs:
        if source.device.type != "cpu" or source.nbytes < _SMALL or not (_is_plain(target) and _is_plain(source)):
            target.copy_(source, non_blocking=source.is_cuda)
        else:
            large.append((target, source))
    pieces = _pieces(large)
    count = min(_THREADS, torch.get_num_threads(), len(pieces))
    others = [threading.Thread(target=_work, args=(pieces,), daemon=True) for _ in range(count - 1)]
    for other in others:
        other.start()
    try:
        _work(pieces)
    finally:  # nobody writes into the copies any more, whatever has interrupted it
        for other in others:
            other.join()


def _pieces(pairs: Iterable[tuple[Tensor, Tensor]]) -> deque[tuple[Any, Any]]:
    pieces: deque[tuple[Any, Any]] = deque()
    for target, source in pairs:
        into, of = as_bytes(target), as_bytes(source)
        pieces.extend((into[at : at + _PIECE], of[at : at + _PIECE]) for at in range(0, len(of), _PIECE))
    return pieces


def _work(pieces: deque[tuple[Any, Any]]) -> None:
    with suppress(IndexError):  # none is left
        while True:
            numpy.copyto(*pieces.popleft())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


class Buffers:
    """Host memory for the tensors of one copy, pinned for those of a GPU, and kept for a later copy."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._copies: Copies | None = None

    def copy(self, content: Any, overlap: Overlap | None = None) -> Any:
        """A copy of nested dicts, lists and tuples that nobody else changes; a tensor that is sharded stays so.

        What comes from a GPU is copied behind the work so far and before all that comes, and what may be copied late
        meanwhile: `wait` before it is read.
        """
        before, self._kept = iter(self._kept), []
        pairs: list[tuple[Tensor, Tensor]] = []
        copied = self._copy(content, before, {}, pairs)
        with torch.no_grad():
            self._copies = Copies(pairs, overlap)
        return copied

    def settle(self) -> None:
        """What is copied late may be written after this."""
        if self._copies is not None:
            self._copies.settle()

    def wait(self) -> None:
        """Until all of it is copied; in the thread that writes it. See ``Copies.check``."""
        if self._copies is not None:
            self._copies.check()

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
            pairs.append((held(buffer), held(value)))
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
