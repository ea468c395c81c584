"""Checkpoints that appear when they are complete, whenever the writer is killed."""

from __future__ import annotations

import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO


def write_whole(io: CheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
    """Save through a file beside it, which takes its place when it is on the disk.

    Lightning writes to a temporary folder and moves the file, which is a copy where that is another file system.
    Plugins of other kinds (asynchronous, sharded) and remote file systems save as they do.
    """
    if type(io) is not TorchCheckpointIO or not isinstance(get_filesystem(path), LocalFileSystem):
        io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        return
    path = os.fspath(path)
    part = f"{path}.part"
    io.save_checkpoint(checkpoint, part, storage_options=storage_options)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
