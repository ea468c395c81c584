"""The thread that writes checkpoints, links and removes them, in the order in which it was asked to."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import IO, Any, NamedTuple

import numpy
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import _is_object_storage
from torch import UntypedStorage

from lightning_eff.plugins.async_checkpoint.checkpoint_file import put_together, take_apart
from lightning_eff.plugins.async_checkpoint.copies import Buffers, Turns
from lightning_eff.plugins.async_checkpoint.staging import Staged
from lightning_eff.training.whole_files import failure_of, whole_file

_ALL = 1 << 62

Save = Callable[[Any, IO[bytes]], None]


class _Waiting(NamedTuple):
    """What has to wait for a save."""

    number: int
    action: Callable[[], Any]
    unless_saved: str | None
    while_linked: str | None


class Writer:
    """Does one thing after the other, in a thread of this process: nothing of it outlives the process.

    What has to wait for a save (a link to it, the removal of an older checkpoint) is done when the newest save is on
    disk. Behind one that has failed or was left out it waits until that one is removed itself, or saved again: what
    stays for lack of a successor goes with the one that succeeds that, and the saves of others, however many, do not
    matter. Nor is one removed while a link points to it: ``ModelCheckpoint`` makes ``last`` anew behind the removal of
    what it has pointed to.

    Args:
        retries: how often a save that failed is tried again.
        retry_seconds: between two attempts.
    """

    def __init__(self, retries: int, retry_seconds: float) -> None:
        self.retries = retries
        self.retry_seconds = retry_seconds
        self.begun = 0
        self._written = 0  # the number of the newest save on disk
        self._lost: dict[int, str] = {}  # saves that never came to be and have not been replaced, for what is held
        self._held: list[_Waiting] = []
        self._error: RuntimeError | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._copies: dict[str, Turns] = {}
        self.hurries = False
        """Whether somebody waits because the run ends with an exception: what waits for another rank gives up soon."""

    @property
    def behind(self) -> int:
        """How many of the latest saves are not on disk with all that was asked for behind them; all there ever were,
        if none is."""
        if not self._written:
            return _ALL
        return max(self.begun - self._written, int(self._last is not None and not self._last.done()))

    @property
    def lost(self) -> list[int]:
        """Which of the saves before those something still waits for: 0 is the latest. To be read behind ``behind``."""
        return [self.begun - number for number in self._lost]

    def save(self, path: str, write: Callable[[], None]) -> None:
        """Write a file, which replaces one of that name."""
        self.begun += 1
        self.submit(partial(self._save, self.begun, path, write))

    def skip(self, path: str) -> None:
        """A save has been left out."""
        self.begun += 1
        self.submit(partial(self._lose, self.begun, path))

    def after_saves(
        self, action: Callable[[], Any], unless_saved: str | None = None, while_linked: str | None = None
    ) -> None:
        """Do something when the newest save is on disk.

        Args:
            action: without arguments.
            unless_saved: not at all, if a file is saved under this name before.
            while_linked: a checkpoint; not as long as a link in its folder points to it.
        """
        self.submit(partial(self._wait, _Waiting(self.begun, action, unless_saved, while_linked)))

    def write_later(self, kind: str, content: Any, write: Callable[[Any, Save], Any]) -> None:
        """Copy something now, and write it behind all that was asked for before.

        Args:
            kind: what it is. Of one kind two may be waiting, and a third one waits for the first.
            content: nested containers of tensors and plain values.
            write: called in the thread with the copy, and with what saves an object to a stream as ``torch.save``.
        """
        turns = self._copies.setdefault(kind, Turns())
        buffers = turns.take()
        try:
            copied = buffers.copy(content)
        except BaseException:
            turns.give_back(buffers)
            raise
        self.submit(partial(self._write, turns, buffers, partial(write, copied, save_object)))

    def submit(self, job: Callable[[], Any]) -> None:
        """Do something behind all that was asked for before, whatever comes of that."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._last = self._pool.submit(self._guarded, job)

    def flush(self) -> None:
        """Wait until all is done."""
        self.hurries = sys.exc_info()[0] is not None
        if self._last is not None:
            self._last.result()
        self.hurries = False

    def close(self) -> None:
        """Flush, end the thread and give the memory back; the next job begins another."""
        self.flush()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pool = self._last = None
        self._copies = {}

    def take_error(self) -> RuntimeError | None:
        """The first failure since the last call."""
        error, self._error = self._error, None
        return error

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _guarded(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception as error:  # whatever it is, the next job comes, and somebody hears of this one
            self._note(
                f"a buffer, a link, a removal or a file beside a checkpoint failed: {type(error).__name__}: {error}",
                error,
            )

    def _save(self, number: int, path: str, write: Callable[[], None]) -> None:
        self._held = [waiting for waiting in self._held if waiting.unless_saved != path]
        error: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.retry_seconds)
            try:
                error = failure_of(write)
            except Exception as bug:  # not the disk: it would fail again
                error = bug
                break
            if error is None:
                break
        if error is not None:
            tried = f" in {attempt + 1} attempts" if attempt else ""
            message = f"{path} could not be written{tried}: {type(error).__name__}: {error}"
            self._lose(number, path)
            self._note(f"{message}; checkpoints of before stay", error)
            return
        self._replace({path})
        self._written = number
        self._do_what_is_due()

    def _lose(self, number: int, path: str) -> None:
        awaited = {waiting.number for waiting in self._held}
        self._lost = {other: lost for other, lost in self._lost.items() if other in awaited} | {number: path}

    def _replace(self, paths: set[str | None]) -> None:
        """These were saved again, or are gone as their like are when a successor is there."""
        self._lost = {number: lost for number, lost in self._lost.items() if lost not in paths}

    def _write(self, turns: Turns, buffers: Buffers, write: Callable[[], Any]) -> None:
        try:
            buffers.wait()
            write()
        finally:
            turns.give_back(buffers)

    def _wait(self, waiting: _Waiting) -> None:
        self._held.append(waiting)
        self._do_what_is_due()

    def _do_what_is_due(self) -> None:
        while due := [waiting for waiting in self._held if self._is_due(waiting)]:
            self._held = [waiting for waiting in self._held if waiting not in due]
            for waiting in due:
                self._guarded(waiting.action)
            self._replace({waiting.while_linked for waiting in due})

    def _is_due(self, waiting: _Waiting) -> bool:
        if waiting.number > self._written or waiting.number in self._lost:
            return False
        return waiting.while_linked is None or not _is_linked(waiting.while_linked)

    def _note(self, message: str, error: Exception) -> None:
        if self._error is None:
            self._error = RuntimeError(message)
            self._error.__cause__ = error


def save_object(content: Any, stream: IO[bytes]) -> None:
    """As ``torch.save``, which holds the interpreter while it computes checksums."""
    pickled, storages = take_apart(content)
    parts = [memoryview(_bytes(storage)) for storage in storages]
    if stream.seekable():
        put_together(stream, pickled, parts)
        return
    whole = io.BytesIO()
    put_together(whole, pickled, parts)
    stream.write(whole.getvalue())


def _bytes(storage: UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy() if storage.nbytes() else numpy.empty(0, numpy.uint8)


def write_staged(staged: Staged, path: str) -> None:
    """The file of a checkpoint: whole, or the one of before."""
    fs, own = url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        with whole_file(own) as part, open(part, "wb") as stream:
            put_together(stream, staged.pickled, staged.contents())
        return
    content = io.BytesIO()  # as Lightning does: a second copy in memory, but what appears is whole
    put_together(content, staged.pickled, staged.contents())
    if _is_object_storage(fs):
        fs.pipe_file(own, content.getvalue())
        return
    with whole_file(path) as part:
        fs.pipe_file(part, content.getvalue())


def _is_linked(path: str) -> bool:
    """Whether a link in the folder of a local file points to it."""
    fs, own = url_to_fs(path)
    folder = os.path.dirname(own)
    if not isinstance(fs, LocalFileSystem) or not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        links = [entry.path for entry in entries if entry.is_symlink()]
    return any(link != own and os.path.realpath(link) == os.path.realpath(own) for link in links)


def link(target: str, path: str) -> None:
    """A link to a checkpoint in place of what has that name: at no moment there is none, or one to nothing."""
    if not os.path.lexists(target):  # it was left out, or could not be written
        return
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    part = f"{path}.part"
    with suppress(FileNotFoundError):
        os.remove(part)
    try:
        os.symlink(os.path.relpath(target, os.path.dirname(path)), part)
    except OSError:  # Windows allows it to some only
        (shutil.copytree if os.path.isdir(target) else shutil.copy)(target, part)
    os.replace(part, path)
