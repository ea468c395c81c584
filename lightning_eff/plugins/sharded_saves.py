"""Sharded checkpoints, written while training goes on."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import override

from lightning_eff.arguments import check, check_count, check_number, check_path
from lightning_eff.plugins.async_checkpoint.copies import Buffers, Turns
from lightning_eff.plugins.async_checkpoint.overlap import Overlap
from lightning_eff.plugins.async_checkpoint.writer import Save, Writer, link
from lightning_eff.plugins.sharded_folder import REST

_PART = ".part"
_Announced = tuple[str, str, str | None]  # path, token, why it is not saved


class ShardedSaveError(RuntimeError):
    """A sharded checkpoint could not be written. Raised on all ranks, at the next save or at the end of the run."""


class ShardedSaves:
    """Saves Lightning's checkpoints as a folder with a file for each rank, in the background.

    ``save`` copies this rank's shards into one of two host buffers, what ``overlap`` allows while the training goes on,
    and returns; a thread writes them by
    ``torch.distributed.checkpoint``, with collectives on a gloo group of its own. The folder is what
    ``ModelParallelStrategy(save_distributed_checkpoint=True)`` writes, and loads with plain Lightning.

    - **Whole or absent.** A checkpoint is written beside its place and takes its name when all ranks have written and
      synced. One of the same name stays until then.
    - **In order.** One save is written after the other. What is removed or linked waits until the saves before it are
      whole, and behind one that has failed until that is removed or saved again. A third save waits for the first one's
      buffer.
    - **Errors** of a disk, on whichever rank, are retried by all ranks together, and then raised on all ranks at the
      next save, by ``flush`` and by ``close``.

    Saving and closing are for all ranks together, in the same order, from the thread that trains. The folder has to be
    one that all ranks see.

    Args:
        timeout: of a collective, after which a rank that waits for a dead one fails; None for torch's.
        retries: how often a save that a disk refused is tried again, >= 0.
        retry_seconds: between two attempts, >= 0.

    Raises:
        ValueError: an argument that is not allowed.

    Example:
        >>> saves = ShardedSaves()
        >>> saves.flush()  # nothing is being written
    """

    def __init__(self, timeout: timedelta | None = None, retries: int = 2, retry_seconds: float = 1.0) -> None:
        ok = timeout is None or (isinstance(timeout, timedelta) and timeout > timedelta())
        check("timeout", timeout, ok, "a timedelta above zero, or None")
        check_count("retries", retries, least=0)
        check_number("retry_seconds", retry_seconds, least=0)
        self.timeout = timeout
        self.agreed = False
        """Whether somebody else asks for errors (``take_error``) and tells all ranks: then none is raised here."""
        self.overlap: Overlap | None = None
        """What nobody writes before ``settle`` is called."""
        self._groups: list[dist.ProcessGroup] = []
        self._latest: Buffers | None = None  # which may still be filled
        self._turns = Turns()
        self._writer = Writer(retries, retry_seconds)

    def save(self, checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
        """Begin to save a checkpoint as ``Trainer.dump_checkpoint`` has made it; the path is that of rank zero.

        Raises:
            ShardedSaveError: a save before this one has failed, on whichever rank; or what is not sharded cannot be
                pickled. This checkpoint is not saved then.
        """
        check_path("path", path)
        self.settle()
        buffers = self._turns.take()  # and by then the save but one before is written
        try:
            job = self._begin(checkpoint, path)
            shards = {"state_dict": checkpoint["state_dict"]}
            shards |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.get("optimizer_states", []))}
            copied = buffers.copy(shards, self.overlap)
        except BaseException:
            self._turns.give_back(buffers)
            raise
        self._latest = buffers
        self._writer.save(job.path, partial(self._write, job, buffers, copied))
        self._writer.submit(partial(self._turns.give_back, buffers))

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, a file or a folder, when the saves before are whole. Only rank zero removes."""
        check_path("path", path)
        if not dist.is_initialized() or dist.get_rank() == 0:
            own = os.fspath(path)
            self._writer.after_saves(partial(_delete, own), unless_saved=own, while_linked=own)

    def link_checkpoint(self, target: str, path: str) -> None:
        """Make a link to a checkpoint, when that is whole; on rank zero."""
        self._writer.after_saves(partial(link, target, path), unless_saved=path)

    def flush(self) -> None:
        """Wait until all is written.

        Raises:
            ShardedSaveError: a save has failed.
        """
        self.settle()
        self._writer.flush()
        if not self.agreed and (error := self._writer.take_error()) is not None:
            raise ShardedSaveError(str(error)) from error

    def close(self) -> None:
        """Flush, and give back the buffers and the process groups; another save makes new ones."""
        try:
            self.flush()
            if (error := self._writer.take_error()) is not None:
                rank_zero_warn(str(error))
        finally:
            self._writer.close()
            self._turns = Turns()
            for group in self._groups:
                dist.destroy_process_group(group)
            self._groups = []

    # --- as of AsyncCheckpointIO ------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a save would have to wait for an earlier one."""
        return self._turns.busy

    @property
    def behind(self) -> int:
        """How many of the latest saves are not whole, or not yet."""
        return self._writer.behind

    @property
    def hurries(self) -> bool:
        """Whether the run ends with an exception, and whoever waits for another rank should give up soon."""
        return self._writer.hurries

    def take_error(self) -> RuntimeError | None:
        """Why the first save since the last call has failed, if one has; the same on all ranks, sooner or later."""
        return self._writer.take_error()

    def settle(self) -> None:
        """Weights or optimizer state are about to be written: what is still read of them comes first."""
        if self._latest is not None:
            self._latest.settle()
            self._latest = None  # behind it: one that is interrupted is not settled

    def count(self) -> None:
        """A save begins, or is left out: every rank takes part and knows."""

    @property
    def lost(self) -> list[int]:
        """Which of the saves before those something still waits for, since they failed or were left out."""
        return self._writer.lost

    def advance(self, behind: int, lost: Sequence[int]) -> None:
        """So many of the latest saves, and those, are not whole: every rank takes part and knows."""

    def skip(self, path: str) -> None:
        """A save is left out: what would wait for it waits until that one is removed, or saved again. On all ranks."""
        self._writer.skip(path)

    def after_saves(self, action: Callable[[], Any], here: bool = True, while_linked: str | None = None) -> None:
        """Do something when all saves so far are whole, in the thread. Every rank takes part in them: ``here`` or not.

        Args:
            action: without arguments.
            here: of no meaning.
            while_linked: a checkpoint that has to be gone first, and waits for this as long as a link points to it.
        """
        self._writer.after_saves(action, while_linked=while_linked)

    def write_later(self, kind: str, content: Any, write: Callable[[Any, Save], Any]) -> None:
        """Copy what belongs beside a checkpoint now, and write it behind all that was asked for before.

        See ``Writer.write_later``. On every rank, for itself.
        """
        self._writer.write_later(kind, content, write)

    # --- a save -----------------------------------------------------------------------------------------------------

    def _begin(self, checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> _Job:
        """Rank zero says what is written where, or why it is not; collective."""
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        # One for the thread that writes and one for the callers: collectives of two threads must not interleave.
        self._groups = self._groups or [dist.new_group(backend="gloo", timeout=self.timeout) for _ in range(2)]
        pickled, announced = self._announce(rest, path) if dist.get_rank() == 0 else (b"", ("", "", None))
        message = [announced]
        dist.broadcast_object_list(message, src=0, group=self._groups[1])
        own, token, failure = message[0]
        if failure is not None:
            if not self.agreed:
                self._writer.flush()  # until this rank knows it too, and none is told twice
                self._writer.take_error()
            raise ShardedSaveError(failure)
        return _Job(own, token, pickled)

    def _announce(
        self, rest: dict[str, Any], path: str | os.PathLike[str]
    ) -> tuple[bytes, tuple[str, str, str | None]]:
        stream = io.BytesIO()
        error = None if self.agreed else self._writer.take_error()
        failure = None if error is None else str(error)
        try:
            torch.save(rest, stream)
        except Exception as bad:
            failure = failure or f"the checkpoint {path} cannot be pickled: {bad}"
        return stream.getvalue(), (os.fspath(path), uuid.uuid4().hex[:8], failure)

    def _write(self, job: _Job, buffers: Buffers, shards: dict[str, Any]) -> None:
        """In the thread: on all ranks in the same order, and with the same end."""
        try:
            save(shards, storage_writer=_Folder(job, buffers), process_group=self._groups[0])
        except CheckpointException as error:  # which is the same on all ranks, and no Exception to Python
            failures = [failure for failure, _ in error.failures.values()]
            kind = OSError if all(isinstance(failure, OSError) for failure in failures) else RuntimeError
            self._leave(job)
            dist.barrier(self._groups[0])  # the next attempt finds nothing of this one
            raise kind(_reason(error)) from error
        except Exception:
            self._leave(job)
            raise

    def _leave(self, job: _Job) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(job.part, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {"retries": self._writer.retries, "retry_seconds": self._writer.retry_seconds}
        return {"timeout": self.timeout, "agreed": self.agreed, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardedSaves.__init__(self, state["timeout"], state["retries"], state["retry_seconds"])
        self.agreed = state["agreed"]


class _Job(NamedTuple):
    """One save."""

    path: str
    token: str
    rest: bytes
    """What is not sharded; of rank zero."""

    @property
    def part(self) -> str:
        """Where it is written."""
        return f"{self.path}.{self.token}{_PART}"


class _Folder(FileSystemWriter):
    """A checkpoint's folder, which is named when all ranks have written."""

    def __init__(self, job: _Job, buffers: Buffers) -> None:
        super().__init__(job.part, per_thread_copy_ahead=0)  # all of it is in host memory
        self.job = job
        self.buffers = buffers

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On each rank. An error of one is raised on all ranks."""
        self.buffers.wait()
        return super().write_data(plan, planner)

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The last thing: on rank zero, when all ranks have written. An error of it is raised on all ranks."""
        super().finish(metadata, results)
        with open(os.path.join(self.job.part, REST), "wb") as file:
            file.write(self.job.rest)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.job.part)
        _take_name(self.job.part, self.job.path)
        folder, name = os.path.split(os.path.abspath(self.job.path))
        for other in os.listdir(folder):  # of a run that was killed: nobody else writes to this name
            if other.startswith(f"{name}.") and other.endswith(_PART):
                _delete(os.path.join(folder, other))


def _reason(error: CheckpointException) -> str:
    """Torch's exception has the traceback of every rank in its text."""
    failures = {rank: failure for rank, (failure, _) in error.failures.items()}
    says = {r: str(e) if isinstance(e, OSError) else f"{type(e).__name__}: {e}" for r, e in failures.items()}
    return "; ".join(f"rank {rank}: {what}" for rank, what in says.items())


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
