"""AsyncCheckpointIO: Lightning's plugin for files, with a copy in host memory and a thread that writes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_eff.arguments import check_count, check_flag, check_number
from lightning_eff.plugins.async_checkpoint.checkpoint_file import check_whole
from lightning_eff.plugins.async_checkpoint.overlap import Overlap
from lightning_eff.plugins.async_checkpoint.staging import Stager
from lightning_eff.plugins.async_checkpoint.writer import Save, Writer, link, write_staged

_ACTIONS_ELSEWHERE = 3


class AsyncCheckpointIO(CheckpointIO):
    """Copies a checkpoint into host memory and writes it while training goes on: whole, checked, in order.

    ``save_checkpoint`` returns when the checkpoint is copied into one of two buffers, which are used again and again; a
    third save waits for the first. A thread writes the file under another name with a checksum for each tensor,
    brings it to the disk, and gives it its name at the end. The file is an ordinary ``.ckpt`` of Lightning. Loading
    checks the checksums, which ``torch.load`` does not.

    ``AsyncCheckpoint`` brings one of these and does more: ranks agree on an error, links and removals of
    ``ModelCheckpoint`` keep their order, copies from a GPU overlap with the next step. Alone, this raises an error at
    the next save or at the end, on rank zero.

    Reads: the checkpoint that it is given.
    Changes: nothing.
    Collectives: none.
    Host syncs: none in ``save_checkpoint``.
    Strategies: those that save through a ``CheckpointIO``: one device, DDP and its kin.

    Args:
        retries: how often a save that a disk refused is tried again, >= 0.
        retry_seconds: between two attempts, >= 0.
        check_loads: look at all checksums of a file before it is loaded, which reads it once more.

    Raises:
        ValueError: an argument out of its range.
        RuntimeError: at the next save and at the end: an earlier save failed; on loading: the file is damaged.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.plugins import AsyncCheckpointIO
        >>> trainer = L.Trainer(plugins=[AsyncCheckpointIO()], accelerator="cpu", logger=False)

    Source: ours.
    """

    def __init__(self, retries: int = 2, retry_seconds: float = 1.0, check_loads: bool = True) -> None:
        check_count("retries", retries, least=0)
        check_number("retry_seconds", retry_seconds, least=0)
        check_flag("check_loads", check_loads)
        self.retries = retries
        self.retry_seconds = retry_seconds
        self.check_loads = check_loads
        self.overlap: Overlap | None = None
        """What nobody writes before ``settle`` is called."""
        self.agreed = False
        """Whether somebody calls ``advance``, once a save, on every rank."""
        self._begin()

    def _begin(self) -> None:
        self._base = TorchCheckpointIO()
        self._stager = Stager()
        self._writer = Writer(self.retries, self.retry_seconds)
        self._elsewhere: list[tuple[int, Callable[[], Any]]] = []
        self._saves = 0

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("AsyncCheckpointIO takes no storage_options, as Lightning's TorchCheckpointIO")
        if not self.agreed:
            self._raise_error()
        staged = self._stager.stage(checkpoint, self.overlap)
        self._writer.save(str(path), partial(write_staged, staged, str(path)))
        self._writer.submit(partial(self._stager.release, staged))

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        self.flush()
        if self.check_loads and not str(path).startswith("http") and get_filesystem(path).exists(str(path)):
            check_whole(path)
        return self._base.load_checkpoint(path, map_location=map_location, weights_only=weights_only)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self._writer.after_saves(partial(self._base.remove_checkpoint, path), str(path), str(path))

    def link_checkpoint(self, target: str, path: str) -> None:
        """Make a link to a checkpoint, when that is on disk."""
        self._writer.after_saves(partial(link, target, path), path)

    @override
    def teardown(self) -> None:
        self.flush()
        self._writer.close()
        self._stager = Stager()  # the buffers go, and a fit that follows gets its own
        waiting, self._elsewhere = self._elsewhere, []
        for _, action in () if self.agreed else waiting:  # where ranks have agreed, these wait for what was not saved
            action()
        if self.agreed or sys.exc_info()[0] is not None:  # the run ends with another exception
            if (error := self.take_error()) is not None:
                rank_zero_warn(str(error))
        else:
            self._raise_error()

    # --- for callbacks and strategies -------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a save would have to wait for an earlier one."""
        return self._stager.busy

    @property
    def behind(self) -> int:
        """How many of the latest saves of this process are not on disk, or not yet."""
        return self._writer.behind

    @property
    def lost(self) -> list[int]:
        """Which of the saves before those something still waits for, since they failed or were left out."""
        return self._writer.lost

    def settle(self) -> None:
        """Weights or optimizer state are about to be written: what is still read of them comes first."""
        self._stager.settle()

    def flush(self) -> None:
        """Wait until all that was asked for is on disk, or has failed."""
        self.settle()
        self._writer.flush()

    def take_error(self) -> RuntimeError | None:
        """Why the first save since the last call has failed, if one has."""
        return self._writer.take_error()

    @property
    def hurries(self) -> bool:
        """Whether the run ends with an exception, and whoever waits for another rank should give up soon."""
        return self._writer.hurries

    def write_later(self, kind: str, content: Any, write: Callable[[Any, Save], Any]) -> None:
        """Copy what belongs beside a checkpoint now, and write it behind all that was asked for before.

        See ``Writer.write_later``. On every rank, for itself.
        """
        self._writer.write_later(kind, content, write)

    def skip(self, path: str) -> None:
        """A save is left out: what would wait for it waits until that one is removed, or saved again."""
        self._writer.skip(path)

    def after_saves(self, action: Callable[[], Any], here: bool, while_linked: str | None = None) -> None:
        """Do something when all saves so far are on disk.

        Args:
            action: without arguments. In another thread, where this process writes.
            here: whether it does. Another rank knows what is on disk when the ranks agree on it (``advance``), and
                otherwise supposes it some saves later.
            while_linked: a checkpoint that has to be gone first, and waits for this as long as a link points to it.
        """
        if here:
            self._writer.after_saves(action, while_linked=while_linked)
            return
        self._elsewhere.append((self._saves, action))
        while not self.agreed and len(self._elsewhere) > _ACTIONS_ELSEWHERE:
            self._elsewhere.pop(0)[1]()

    def advance(self, behind: int, lost: Sequence[int]) -> None:
        """On all ranks, before a save and when all is flushed: so many of the latest saves, and those, are missing."""
        held = [saves > self._saves - behind or self._saves - saves in lost for saves, _ in self._elsewhere]
        waiting = list(zip(held, self._elsewhere, strict=True))
        self._elsewhere = [one for waits, one in waiting if waits]
        for waits, (_, action) in waiting:
            if not waits:
                action()

    def count(self) -> None:
        """On all ranks: a save begins, or is left out."""
        self._saves += 1

    def warm(self, size: int, pinned: bool, buffers: int) -> None:
        """Get memory for checkpoints of so many bytes, in the thread, before the first save needs it."""
        idle = self._stager.take_idle(buffers)
        self._writer.submit(partial(self._stager.warm, idle, size, pinned))

    def _raise_error(self) -> None:
        error = self.take_error()
        if error is not None:
            raise error

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        own = ("_base", "_stager", "_writer", "_elsewhere", "_saves")
        return {name: value for name, value in vars(self).items() if name not in own} | {"overlap": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()
