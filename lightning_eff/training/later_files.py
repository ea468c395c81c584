"""What belongs beside a checkpoint, and is written when that is: now, or in the background by each rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import IO, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.strategies import Strategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

from lightning_eff.training.whole_files import failure_of, whole_file

# Lightning looks for "last*.ckpt" and for the number in "hpc_ckpt_3.ckpt": a folder of this name does not disturb it.
SUFFIX = ".ranks"

_PREFIX = "lightning_eff/written/"
_WELL = "well"
_LOOK = 0.01  # seconds between two looks
_HURRIED = 10.0  # seconds: for ranks that live, and have files to write as this one had


Save = Callable[[Any, IO[bytes]], Any]


def saver_of(strategy: Strategy) -> Any:
    """What writes a strategy's checkpoints: its ``sharded_saves``, where it saves later by them, or a CheckpointIO.

    One that has ``write_later(kind, content, write)`` copies the content now, and calls ``write(copy, save)`` in its
    thread, behind all that it was asked for before, where ``save(object, stream)`` writes as ``torch.save``.
    """
    sharded: Any = getattr(strategy, "sharded_saves", None)
    return sharded if getattr(strategy, "saves_later", False) and sharded is not None else strategy.checkpoint_io


def write_all(files: dict[str, Any], save: Save = torch.save) -> Exception | None:
    """Path -> object; each by itself, so that one that is too big for the disk leaves the others."""
    error: Exception | None = None
    for path, content in files.items():
        error = failure_of(partial(_write, content, path, save)) or error
    return error


def _write(content: Any, path: str, save: Save) -> None:
    with whole_file(path) as part, get_filesystem(part).open(part, "wb") as stream:
        save(content, stream)


def file_name(identity: str, name: str, rank: int | None) -> str:
    """Of an owner's state beside the checkpoint of an id; of one rank, or of all."""
    return f"{identity}.{name}.pt" if rank is None else f"{identity}.{name}.rank{rank}.pt"


def folders_of(path: str) -> list[str]:
    """Where the files of a checkpoint may be: in its own folder, or in that of one that it was copied from."""
    fs = get_filesystem(path)
    fs.invalidate_cache()
    beside = fs.ls(os.path.dirname(path) or ".", detail=False)
    return [path + SUFFIX, *(folder for folder in beside if folder.endswith(SUFFIX))]


def is_newer(identity: str, than: str) -> bool:
    """Whether it is of a later checkpoint of the same run."""
    (run, _, number), (same, _, latest) = identity.rpartition("-"), than.rpartition("-")
    return run == same and number.isdecimal() and int(number) > int(latest)


class Others:
    """Whether the other ranks have written their part of something, by the store of the process group.

    Each rank says it once, in a thread of its own; rank zero waits for all. It gives up after the process group's usual
    time, and soon where the run ends with an exception, since a rank that has died says nothing.

    Args:
        what: a name that no other part of any run in this process group has.
        rank: of this process.
        world_size: how many there are.
        hurried: whether somebody waits for this thread to end.

    Example:
        >>> Others("step 5", rank=0, world_size=1, hurried=lambda: False).have_written(None)
        []
    """

    def __init__(self, what: str, rank: int, world_size: int, hurried: Callable[[], bool]) -> None:
        self.what = what
        self.rank = rank
        self.world_size = world_size
        self.hurried = hurried

    def have_written(self, error: Exception | None) -> list[Exception]:
        """Say that this rank has, or why not; on rank zero wait for the others.

        Returns:
            This rank's error, and on rank zero those of the others too.
        """
        errors = [] if error is None else [error]
        if self.world_size == 1 or not dist.is_initialized():
            return errors
        store = _get_default_store()
        if self.rank != 0:
            store.set(self._key(self.rank), _WELL if error is None else f"{type(error).__name__}: {error}")
            return errors
        for rank in range(1, self.world_size):
            if not self._wait(store, rank):
                errors.append(RuntimeError(f"rank {rank} has not said that it has written its part"))
                break  # nor do more of them have to be waited for
            said = store.get(self._key(rank)).decode()
            errors += [OSError(f"on rank {rank}: {said}")] if said != _WELL else []
            with suppress(Exception):  # not every kind of store can forget
                store.delete_key(self._key(rank))
        return errors

    def _key(self, rank: int) -> str:
        return f"{_PREFIX}{self.what}/{rank}"

    def _wait(self, store: Any, rank: int) -> bool:
        end = time.monotonic() + default_pg_timeout.total_seconds()
        hurried = False
        while not store.check([self._key(rank)]):
            if self.hurried() and not hurried:
                hurried, end = True, time.monotonic() + _HURRIED
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK)
        return True
