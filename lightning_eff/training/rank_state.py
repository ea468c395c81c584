"""State that each rank has for itself, kept in files beside Lightning's checkpoints.

A callback's ``state_dict`` is written by rank zero alone. What differs between ranks (error-feedback memories) or is
too big to be put into the ``.ckpt`` (a window of weights) goes into a folder beside the checkpoint: one file for each
owner and rank, and for an owner whose state is the same on all ranks one file of rank zero, which every rank reads:

    checkpoints/last.ckpt
    checkpoints/last.ckpt.ranks/<id>.compression.rank0.pt
    checkpoints/last.ckpt.ranks/<id>.compression.rank1.pt
    checkpoints/last.ckpt.ranks/<id>.average-ema.pt

The checkpoint carries the same id, so no file is ever taken for another checkpoint's. The new files are complete before
the checkpoint is written, and the old ones go after that: whenever a run is killed, the checkpoint on disk has its own.
A disk that fails here is a warning: the checkpoint is complete without these files.

Where checkpoints are written while training goes on, so are these: copied within the save, and written by each rank.
Rank zero begins with the checkpoint when it knows that the others have (``later_files``); no step waits for that.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_eff.arguments import check, check_flag, check_text
from lightning_eff.training.later_files import SUFFIX, Others, file_name, folders_of, is_newer, saver_of, write_all
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import replicas_are_equal
from lightning_eff.training.whole_files import Attempts
from lightning_eff.training.wrapping import Wrapper

KEY = "lightning_eff_rank_state"  # in the checkpoint: which files belong to it

_ATTRIBUTE = "_lightning_eff_rank_files"
_WRAPPED = ("save_checkpoint", "load_checkpoint", "remove_checkpoint")


class RankState:
    """One owner's rank-local state, which follows the checkpoints that Lightning saves, loads, links and removes.

    A callback attaches it in ``setup`` (stage ``"fit"``), a strategy attaches it to itself at the end of
    ``setup_environment``; always on all ranks, in the same order. Any number of owners share the files of a
    checkpoint. It stays attached after ``fit``, as ``trainer.save_checkpoint`` works there too; ``detach`` ends it.
    Checkpoints with ``save_weights_only`` have no such state.

    Collectives: attaching broadcasts a few bytes; saving reduces one flag behind the checkpoint that Lightning writes,
    where that is written at once; loading reduces one for each owner. A rank's files are written before
    ``save_checkpoint`` returns, or where the checkpoint is written later, before that; those of older checkpoints go
    when the newer one is on disk.

    Args:
        name: tells the owners apart, and finds the state again: the same in the run that resumes.
        save: called on every rank when a checkpoint is saved; returns a dict of what ``torch.load(weights_only=True)``
            accepts.
        load: called on every rank when ``fit`` loads a checkpoint that was saved with this name, under most strategies
            before the optimizers exist: keep the state until ``on_train_start``. Tensors are on the CPU. It gets None,
            and rank zero warns, if not every rank has its state back (another number of ranks, a file missing): all
            ranks are told the same and start anew together. It is not called for a checkpoint that never had such a
            state.
        saved: called on every rank behind each checkpoint that is saved, one of weights only too, with its dict and
            its path: to write more files beside it.
        removed: called on every rank on which a checkpoint is removed, with its path, to remove those files.
        recover: called on every rank where the state is lost, with the checkpoint and its path: what it can make of
            other files goes to ``load`` in place of the state; None for nothing.

    Attributes:
        replicated: the state is the same on all ranks: rank zero writes it, and it is loaded whatever the number of
            ranks is. To be set before ``attach``.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> memory = {"error": torch.zeros(3)}
        >>> state = RankState("error_feedback", save=lambda: memory, load=lambda saved: memory.update(saved or {}))
        >>> strategy = SingleDeviceStrategy()
        >>> state.attach(strategy)
        >>> state.detach()
    """

    def __init__(
        self,
        name: str,
        save: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any] | None], None],
        saved: Callable[[dict[str, Any], str], None] | None = None,
        removed: Callable[[str], None] | None = None,
        recover: Callable[[dict[str, Any], str], dict[str, Any] | None] | None = None,
        replicated: bool = False,
    ) -> None:
        check_text("name", name)
        for argument, function in {"save": save, "load": load}.items():
            check(argument, function, callable(function), "a function")
        for argument, optional in {"saved": saved, "removed": removed, "recover": recover}.items():
            check(argument, optional, optional is None or callable(optional), "a function, or None")
        check_flag("replicated", replicated)
        self.name = name
        self.save = save
        self.load = load
        self.saved = saved
        self.removed = removed
        self.recover = recover
        self.replicated = replicated
        self._files: _RankFiles | None = None

    def attach(self, strategy: Strategy) -> None:
        """Follow the checkpoints of a strategy, in place of the one followed before. Collective.

        Raises:
            ValueError: another owner of the same name is attached.
        """
        files: _RankFiles = strategy.__dict__.get(_ATTRIBUTE) or _RankFiles(strategy)
        if self._files is not files:
            self.detach()
            files.add(self)
            self._files = files
        files.begin()

    def follows(self, strategy: Strategy) -> bool:
        """Whether the checkpoints of a strategy have this state; not where ``fit`` ran in a process of its own."""
        return self._files is not None and self._files.strategy is strategy

    def of_rank(self, path: str, checkpoint: dict[str, Any], rank: int) -> dict[str, Any] | None:
        """What another rank has saved, for `recover`; None where its file is missing or damaged."""
        assert self._files is not None
        return self._files.read(path, checkpoint[KEY]["id"], self.name, rank)

    def detach(self) -> None:
        """Follow no longer. The files stay; when the last owner has gone, the strategy is as it was."""
        if self._files is not None:
            self._files.discard(self)
            self._files = None


def rank_state_owners(strategy: Strategy) -> dict[str, RankState]:
    """Those that are attached to a strategy, by name."""
    files: _RankFiles | None = strategy.__dict__.get(_ATTRIBUTE)
    return {} if files is None else files.owners


def rank_state_files(path: str, checkpoint: dict[str, Any]) -> list[str]:
    """The files of all ranks that should be beside a loaded checkpoint, or beside the one that it is a copy of."""
    entry = checkpoint.get(KEY)
    if entry is None or "replicated" not in entry:  # the latter of version 0.1, which had other names
        return []
    names = [
        file_name(entry["id"], name, rank)
        for name in entry["names"]
        for rank in ([None] if name in entry["replicated"] else range(entry["world_size"]))
    ]
    folders = folders_of(os.path.realpath(path))
    places = [[os.path.join(folder, name) for folder in folders] for name in names]
    return [next(filter(os.path.exists, each), each[0]) for each in places]


class _RankFiles:
    """Stands in front of three methods of one strategy."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.owners: dict[str, RankState] = {}
        self.run = ""
        self.saved = 0
        self.ids: dict[str, list[str]] = {}  # path of a checkpoint -> its id, behind those that may still be on disk
        self.attempts = Attempts("state beside a checkpoint", "a run that resumes from it is without what is missing")
        self.wrappers = [Wrapper(strategy, name, getattr(self, name)) for name in _WRAPPED]
        setattr(strategy, _ATTRIBUTE, self)

    def begin(self) -> None:
        """Agree on a name for this run: the id of its n-th checkpoint is that name with n behind it.

        When they save ranks do not agree: one that saves alone, because of an exception, must not wait for the others.
        """
        self.run = self.strategy.broadcast(uuid.uuid4().hex[:16])
        self.saved = 0

    def add(self, owner: RankState) -> None:
        if owner.name in self.owners:
            raise ValueError(f"name={owner.name!r} is taken: every owner of rank-local state needs a name of its own")
        self.owners[owner.name] = owner

    def discard(self, owner: RankState) -> None:
        del self.owners[owner.name]
        if self.owners:
            return
        delattr(self.strategy, _ATTRIBUTE)
        for wrapper in self.wrappers:
            wrapper.remove()

    def save_checkpoint(
        self, save: Callable[..., Any], checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        path = str(filepath)
        identity, wrote = "", self.writes
        error: Exception | None = None
        states: dict[str, Any] = {}
        if "optimizer_states" in checkpoint:  # else it is one of weights only
            self.saved += 1
            identity = f"{self.run}-{self.saved}"
            if self.of_replicas:  # each of which has begun by itself, and any may have to end what another began
                identity = self.strategy.broadcast(identity)
            states = {name: owner.save() for name, owner in self.owners.items()}
        # Before its files are there: those of an older checkpoint may be removed in another thread at any time.
        self.ids.setdefault(path, []).append(identity)
        if identity:
            error = self.keep(path, identity, states) if wrote else None
            replicated = [name for name, owner in self.owners.items() if owner.replicated]
            about = {"world_size": self.world_size, "names": list(states), "replicated": replicated}
            checkpoint[KEY] = {"version": 1, "id": identity, **about}
        save(checkpoint, filepath, storage_options=storage_options)
        while True:
            writes = self.writes
            if identity and writes and not wrote:  # of the replica that has died over it only the files remain
                error = self.keep(path, identity, states)
                wrote = True
            for owner in self.owners.values():
                if owner.saved is not None:
                    owner.saved(checkpoint, path)
            if not self.of_replicas or self.strategy.is_written(writes):  # type: ignore[attr-defined]
                break
        if not hasattr(saver_of(self.strategy), "write_later"):
            # Only when all ranks have come here is the checkpoint there, with the files of all.
            everywhere = self.strategy.reduce_boolean_decision(error is None, all=True)
            self.attempts.note(error if error or everywhere else OSError("on another rank"))
        self.when_saved(partial(self.remove_older, path, identity, f"{self.run}-{self.saved}"))

    def keep(self, path: str, identity: str, states: dict[str, Any]) -> Exception | None:
        """Write this rank's files, now or later; what has gone wrong now."""
        files = {}
        for name, state in states.items():
            replicated = self.owners[name].replicated
            if not replicated or self.rank == 0:
                file = os.path.join(path + SUFFIX, file_name(identity, name, None if replicated else self.rank))
                files[file] = {"id": identity, "rank": self.rank, "state": state}
        saver = saver_of(self.strategy)
        if not hasattr(saver, "write_later"):
            return write_all(files)
        others = Others(identity, self.rank, self.world_size, lambda: saver.hurries)

        def write(files: dict[str, Any], save: Callable[[Any, Any], Any]) -> None:
            errors = others.have_written(write_all(files, save))
            if self.rank == 0:
                self.attempts.note(next(iter(errors), None))

        saver.write_later("state of a rank", files, write)
        return None

    def when_saved(self, action: Callable[[], Any], removed: str | None = None) -> None:
        """Do something when all saves so far are on disk, and one is removed: at once, unless that is done later."""
        saver = saver_of(self.strategy)
        if hasattr(saver, "after_saves"):
            saver.after_saves(action, here=self.strategy.is_global_zero, while_linked=removed)
        else:
            action()

    def remove_older(self, path: str, identity: str, latest: str) -> None:
        """The checkpoint with this id is on disk, or one of weights only: those before it are not."""
        ids = self.ids.get(path, [])
        first = ids.index(identity) if identity in ids else len(ids)
        if is_a(self.strategy.checkpoint_io, AsyncCheckpointIO):
            first = max(0, first - 1)  # the checkpoint on disk may still be the one before
        del ids[:first]
        # Its removal may have been asked for already, and waits for a later save.
        self.remove_files(path, {identity, *ids} - {""}, latest)

    def load_checkpoint(
        self, load: Callable[..., Any], checkpoint_path: _PATH, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = load(checkpoint_path, *args, **kwargs)
        entry: dict[str, Any] = checkpoint.get(KEY, {"names": ()})
        owners = [owner for owner in self.owners.values() if owner.name in entry["names"]]
        if not owners or not self.is_fitting:
            return checkpoint
        check_version("RankState", entry, known=1)
        path = str(checkpoint_path)
        self.ids[path] = [entry["id"]]
        for owner in owners:
            state, why = self.find(path, entry, owner)
            state = self.on_all_ranks(state)
            if state is None and owner.recover is not None:
                state = self.on_all_ranks(owner.recover(checkpoint, path))
                if state is not None:
                    rank_zero_warn(f"the state ({owner.name}) is taken from the files beside {path}: {why}")
            if state is None:
                rank_zero_warn(f"the state ({owner.name}) beside {path} is not restored but starts anew: {why}")
            owner.load(state)
        return checkpoint

    def find(self, path: str, entry: dict[str, Any], owner: RankState) -> tuple[dict[str, Any] | None, str]:
        """An owner's state on this rank, or why there is none."""
        saved, here = entry["world_size"], self.world_size
        # Of version 0.1, which wrote a file for each rank in any case, any of them is as good.
        replicated = owner.name in entry.get("replicated", [owner.name] if owner.replicated and saved != here else ())
        if not replicated and saved != here:
            return None, f"it was saved by {saved} ranks, and there are {here} now"
        if not replicated and owner.replicated and "replicated" in entry:
            return None, "it was saved in shards"
        state = self.read(path, entry["id"], owner.name, None if replicated else self.rank)
        return state, "the file of some rank is missing or damaged"

    def on_all_ranks(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        return state if self.strategy.reduce_boolean_decision(state is not None, all=True) else None

    def remove_checkpoint(self, remove: Callable[..., Any], filepath: _PATH) -> None:
        remove(filepath)
        path = str(filepath)
        self.ids.pop(path, None)
        self.when_saved(partial(self.remove_beside, path, f"{self.run}-{self.saved}"), removed=path)

    def remove_beside(self, path: str, latest: str) -> None:
        """The checkpoint is gone, or another has been saved in its place since the one with the latest id."""
        ids = self.ids.get(path, [])
        self.remove_files(path, {*ids} - {""}, latest)
        for owner in self.owners.values():
            if owner.removed is not None and not ids:
                owner.removed(path)

    def read(self, path: str, identity: str, name: str, rank: int | None) -> dict[str, Any] | None:
        """A state, beside the checkpoint that a link points to or that this one was copied from."""
        if os.path.lexists(path):
            path = os.path.realpath(path)
        fs, folders = get_filesystem(path), folders_of(path)
        names = (file_name(identity, name, rank), f"{identity}.rank{rank or 0}.pt")  # the latter of version 0.1
        for file in (os.path.join(folder, own) for own in names for folder in folders):
            if fs.exists(file):
                # Whatever is wrong with a file, the run can go on without it, and says so.
                with suppress(Exception), fs.open(file, "rb") as stream:
                    saved = torch.load(stream, map_location="cpu", weights_only=True)
                    if (saved["id"], saved["rank"]) == (identity, rank or 0):
                        state: dict[str, Any] = saved["state"] if "state" in saved else saved["states"][name]
                        return state
        return None

    def remove_files(self, path: str, keep: set[str], latest: str) -> None:
        """Remove the files of a checkpoint, but those of some ids, and those that other ranks write already.

        Each rank removes its own, which may be on a disk that only this machine sees. Rank zero removes all, so that
        none stays of a run with more ranks, or when only rank zero is asked.
        """
        if not self.writes:
            return
        fs = get_filesystem(path)
        fs.invalidate_cache()
        folder = path + SUFFIX
        if not fs.isdir(folder):
            return
        try:
            files = fs.ls(folder, detail=False)
        except FileNotFoundError:  # another rank was quicker
            return
        for file in files:
            identity, _, rest = os.path.basename(file).partition(".")
            own = self.rank == 0 or rest.endswith(f"rank{self.rank}.pt")
            if own and identity not in keep and not is_newer(identity, latest):
                with suppress(FileNotFoundError):  # another rank was quicker
                    fs.rm_file(file)
        if not keep:
            with suppress(OSError):  # the files of other ranks are in it, or another rank was quicker
                fs.rmdir(folder)

    @property
    def rank(self) -> int:
        return 0 if self.of_replicas else int(getattr(self.strategy, "global_rank", 0))

    @property
    def of_replicas(self) -> bool:
        """Each replica is a world of its own, and they are equal: one of them writes for all."""
        return replicas_are_equal(self.strategy)

    @property
    def writes(self) -> bool:
        return not self.of_replicas or self.strategy.is_global_zero

    @property
    def world_size(self) -> int:
        return 1 if self.of_replicas else int(getattr(self.strategy, "world_size", 1))

    @property
    def is_fitting(self) -> bool:
        """A checkpoint that is only evaluated leaves this alone; Lightning gives callbacks their state even then."""
        module = self.strategy.lightning_module
        return module is None or module._trainer is None or module._trainer.state.fn == TrainerFn.FITTING
