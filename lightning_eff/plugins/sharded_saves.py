"""Sharded checkpoints, written while training goes on."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from typing_extensions import override

from lightning_eff.arguments import check, check_path
from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.dtensor import local

_REST = "meta.pt"  # as Lightning names it, by which it knows the folder again
_PART = ".part"


class ShardedSaveError(RuntimeError):
    """A sharded checkpoint could not be written. Raised on all ranks, at the next save or at the end of the run."""


class ShardedSaves:
    """Saves Lightning's checkpoints as a folder with a file for each rank, in the background.

    ``save`` copies this rank's shards into one of two host buffers and returns; ``async_save`` of
    ``torch.distributed.checkpoint`` writes them in a thread, with collectives on a gloo group of its own. The folder is
    what ``ModelParallelStrategy(save_distributed_checkpoint=True)`` writes, and loads with plain Lightning.

    - **Whole or absent.** A checkpoint is written beside its place and takes its name when all ranks have written and
      synced. One of the same name stays until then.
    - **In order.** One save is written after the other, and what is removed goes when the saves before it are whole;
      if one has failed, it stays. A third save waits for the first one's buffer.
    - **Errors** of any rank are raised on all ranks at the next save, by ``flush`` and by ``close``.

    Saving and closing are for all ranks together, in the same order, from the thread that trains. The folder has to be
    one that all ranks see.

    Args:
        timeout: of a collective, after which a rank that waits for a dead one fails; None for torch's.

    Raises:
        ValueError: an argument that is not allowed.

    Example:
        >>> saves = ShardedSaves()
        >>> saves.flush()  # nothing is being written
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        ok = timeout is None or (isinstance(timeout, timedelta) and timeout > timedelta())
        check("timeout", timeout, ok, "a timedelta above zero, or None")
        self.timeout = timeout
        self._groups: list[dist.ProcessGroup] = []
        self._buffers = deque([_Buffers(), _Buffers()])
        self._jobs: deque[_Job] = deque(maxlen=2)
        self._failure: str | None = None
        self._lock = Lock()

    def save(self, checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
        """Begin to save a checkpoint as ``Trainer.dump_checkpoint`` has made it; the path is that of rank zero.

        Raises:
            ShardedSaveError: a save before this one has failed, on whichever rank; or what is not sharded cannot be
                pickled. This checkpoint is not saved then.
        """
        check_path("path", path)
        if len(self._jobs) == 2:
            wait([self._jobs[0].done])  # its buffer is the one to be used now
        shards = {"state_dict": checkpoint["state_dict"]}
        shards |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.get("optimizer_states", []))}
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        writing, agreeing = self._groups = self._groups or self._new_groups()
        pickled, announced = self._announce(rest, path) if dist.get_rank() == 0 else (b"", {})
        message = [announced]
        dist.broadcast_object_list(message, src=0, group=agreeing)
        if message[0]["failure"] is not None:
            wait([job.done for job in self._jobs])  # until this rank knows it too, and none is told twice
            self._failure = None
            raise ShardedSaveError(message[0]["failure"])
        job = _Job(message[0]["path"], message[0]["token"])
        self._buffers.rotate()
        before = self._jobs[-1].done if self._jobs else None
        writer = _Folder(job, self._buffers[0], before, pickled)
        upload = async_save(shards, storage_writer=writer, process_group=writing)
        self._jobs.append(job)
        upload.add_done_callback(lambda upload: self._end(job, upload))  # type: ignore[union-attr]

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, a file or a folder, when the saves before are whole. Only rank zero removes."""
        check_path("path", path)
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        with self._lock:
            if self._jobs and not self._jobs[-1].ended:
                self._jobs[-1].removals.append(os.fspath(path))
                return
            if self._failure is not None:
                return
        _delete(os.fspath(path))

    def flush(self) -> None:
        """Wait until all is written.

        Raises:
            ShardedSaveError: a save has failed.
        """
        wait([job.done for job in self._jobs])
        failure, self._failure = self._failure, None
        if failure is not None:
            raise ShardedSaveError(failure)

    def close(self) -> None:
        """Flush, and give back the buffers and the process groups; another save makes new ones."""
        try:
            self.flush()
        finally:
            self._jobs.clear()
            self._buffers = deque([_Buffers(), _Buffers()])
            for group in self._groups:
                dist.destroy_process_group(group)
            self._groups = []

    def _new_groups(self) -> list[dist.ProcessGroup]:
        """One for the thread that writes and one for the callers: collectives of two threads must not interleave."""
        return [dist.new_group(backend="gloo", timeout=self.timeout) for _ in range(2)]

    def _announce(self, rest: dict[str, Any], path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
        """What rank zero alone writes, and what it tells the others."""
        stream, failure = io.BytesIO(), self._failure
        try:
            torch.save(rest, stream)
        except Exception as error:
            failure = failure or f"the checkpoint {path} cannot be pickled: {error}"
        about = {"path": os.fspath(path), "token": uuid.uuid4().hex[:8], "failure": failure}
        return stream.getvalue(), about

    def _end(self, job: _Job, upload: Future[Any]) -> None:
        """In the thread that has written."""
        try:
            error = upload.exception()
            if error is not None:
                self._failure = self._failure or f"the checkpoint {job.path} could not be written: {_reason(error)}"
                if dist.get_rank() == 0:
                    shutil.rmtree(job.part, ignore_errors=True)
            while True:
                with self._lock:
                    removals, job.removals = job.removals, []
                    job.ended = not removals
                if job.ended:
                    break
                if self._failure is None:
                    for path in removals:
                        _delete(path)
        except Exception as error:  # of a disk, while it removes
            self._failure = self._failure or f"behind the checkpoint {job.path}: {error}"
        finally:
            job.ended = True
            job.done.set_result(None)


@dataclass
class _Job:
    """One save."""

    path: str
    token: str
    removals: list[str] = field(default_factory=list)
    """What goes when it is written."""
    ended: bool = False
    """Takes no more removals."""
    done: Future[None] = field(default_factory=Future)

    @property
    def part(self) -> str:
        """Where it is written."""
        return f"{self.path}.{self.token}{_PART}"


class _Folder(FileSystemWriter):
    """A checkpoint's folder: copied at once, written in its turn, and named when all ranks have written."""

    def __init__(self, job: _Job, buffers: _Buffers, before: Future[None] | None, rest: bytes) -> None:
        super().__init__(job.part)
        self.job = job
        self.buffers = buffers
        self.before = before
        self.rest = rest

    @override
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.per_thread_copy_ahead = 0  # it is in host memory
        return self.buffers.copy(state_dict)

    @override
    def set_up_storage_writer(self, *args: Any, **kwargs: Any) -> None:
        """The first thing that happens in the thread, before any collective."""
        if self.before is not None:
            wait([self.before])
        super().set_up_storage_writer(*args, **kwargs)

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The last thing: on rank zero, when all ranks have written. An error of it is raised on all ranks."""
        super().finish(metadata, results)
        with open(os.path.join(self.job.part, _REST), "wb") as file:
            file.write(self.rest)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.job.part)
        _take_name(self.job.part, self.job.path)
        folder, name = os.path.split(os.path.abspath(self.job.path))
        for other in os.listdir(folder):  # of a run that was killed: nobody else writes to this name
            if other.startswith(f"{name}.") and other.endswith(_PART):
                _delete(os.path.join(folder, other))


class _Buffers:
    """Host memory for the tensors of one save, kept for the next but one."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of nested containers that nobody else changes; sharded tensors stay sharded."""
        before, self._kept = iter(self._kept), []
        copied: dict[str, Any] = self._copy(state, before)
        if any(local(buffer).is_pinned() for buffer in self._kept):
            torch.accelerator.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, before: Iterator[Tensor]) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(entry, before) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(entry, before) for entry in value)
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        buffer = next(before, None)
        if buffer is None or _form(buffer) != _form(value):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        local(buffer).copy_(local(value), non_blocking=True)
        self._kept.append(buffer)
        return buffer


def _form(tensor: Tensor) -> tuple[Any, ...]:
    form = (type(tensor.detach()), tensor.shape, tensor.stride(), tensor.dtype)
    return (*form, tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else form  # type: ignore[attr-defined]


def _reason(error: BaseException) -> str:
    """Torch's exception has the traceback of every rank in its text."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
    return f"{type(error).__name__}: {error}"


def _take_name(part: str, path: str) -> None:
    """Give a folder its name; what has had it goes then."""
    if not os.path.lexists(path):
        os.rename(part, path)
    else:
        if not _exchange(part, path):
            os.rename(path, f"{part}.old")
            os.rename(part, path)
            part = f"{part}.old"
        _delete(part)
    _sync_folder(os.path.dirname(os.path.abspath(path)))


def _exchange(one: str, other: str) -> bool:
    """Let two names change places at once, where the system and the file system can: Linux, but not on NFS."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
