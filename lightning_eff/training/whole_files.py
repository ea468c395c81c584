"""The one policy for the files that the suite writes: whole or absent, and a failing disk does not end a run.

A file is written under another name beside its own, reaches the disk, and takes its name at the end: what is there is
whole, whenever the writer is killed. What was begun is removed when writing fails, and the file of before stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lightning_eff.training.namespaces import both


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path to write to, whose file takes the name ``path`` when the block ends, and is removed if it fails.

    Local paths and those of fsspec. Folders are made.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with whole_file(f"{folder}/state") as part, open(part, "w") as file:
        ...     _ = file.write("complete")
        >>> os.listdir(folder)
        ['state']
    """
    path = os.fspath(path)
    fs, own = url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        path = own  # without `file://` and `~`, which Lightning takes
    part = f"{path}.part"
    fs.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        # Not written over: a process that was stopped in the midst of it goes on writing later, into what it has open.
        with suppress(OSError):
            os.unlink(part)
    try:
        yield part
        if isinstance(fs, LocalFileSystem):
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_folder(os.path.dirname(path) or ".")
        else:
            fs.mv(part, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(part)
        raise


def _sync_folder(folder: str) -> None:
    """The file's name reaches the disk too. Some systems open no folder, and some file systems sync none."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(
    io: CheckpointIO,
    checkpoint: dict[str, Any],
    path: Any,
    storage_options: Any = None,
    last_look: Callable[[], None] | None = None,
) -> None:
    """Save a checkpoint of Lightning so.

    ``last_look`` is called when all is written and before the file takes its name; if it raises, the file does not.

    Lightning writes to a temporary folder and moves the file, which is a copy where that is another file system.
    Plugins of other kinds (asynchronous, sharded) and remote file systems save as they do.
    """
    if type(io) not in both(TorchCheckpointIO) or not isinstance(get_filesystem(path), LocalFileSystem):
        if last_look is not None:
            last_look()
        io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        return
    with whole_file(path) as part:
        io.save_checkpoint(checkpoint, part, storage_options=storage_options)
        if last_look is not None:
            last_look()


def failure_of(write: Callable[[], None]) -> Exception | None:
    """Write something; the exception, if the disk has failed. Any other exception is raised."""
    outside = sys.exc_info()[1]  # a run may be saving because of one, which has nothing to do with this
    try:
        write()
    except Exception as error:
        cause: BaseException | None = error  # torch.save turns the disk's error into one about the zip file's end
        while cause is not None and cause is not outside:
            if isinstance(cause, OSError):
                return cause
            cause = cause.__cause__ or cause.__context__
        raise
    return None


class Attempts:
    """Writes files that a run can do without: a disk that fails is a warning, once for each spell of failures.

    Args:
        what: that is written, for the message, such as "the averaged weights".
        consequence: what follows, to end the message.
    """

    def __init__(self, what: str, consequence: str) -> None:
        self.what = what
        self.consequence = consequence
        self.failing = False
        """Whether the last attempt has failed."""

    def __call__(self, write: Callable[[], None]) -> bool:
        """Try once; the next one tries again.

        Returns:
            Whether it was written.
        """
        return self.note(failure_of(write))

    def note(self, error: Exception | None) -> bool:
        """Say that an attempt has failed (with ``error``) or not, where the ranks had to agree on that first."""
        if error is not None and not self.failing:
            rank_zero_warn(
                f"{self.what} could not be written ({error}): training goes on, {self.consequence}, and the next "
                "time is tried again"
            )
        self.failing = error is not None
        return not self.failing
