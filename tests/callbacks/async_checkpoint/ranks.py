"""What runs on each of two ranks."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from harness.runs import ddp, fit
from lightning_eff.callbacks import AsyncCheckpoint
from lightning_eff.plugins.async_checkpoint import io
from lightning_eff.training import RankState, later_files
from tests.callbacks.async_checkpoint.runs import Model


class Memory(L.Callback):
    """Rank-local state: a number of its own on each rank, which changes in each step."""

    def __init__(self) -> None:
        self.value = torch.zeros(1)
        self.loaded: float | None = None
        self.state = RankState("memory", lambda: {"value": self.value.clone()}, self._load)

    def _load(self, state: dict[str, Any] | None) -> None:
        self.loaded = None if state is None else float(state["value"])

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.state.attach(trainer.strategy)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.value.fill_(100 * trainer.global_rank + trainer.global_step)


class Look(L.Callback):
    """Checkpoints that are without the files of their ranks, at the begin of each step."""

    def __init__(self, folder: Path, gate: threading.Event) -> None:
        self.folder, self.gate, self.steps, self.incomplete = folder, gate, 0, []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.strategy.barrier()
        self.steps += 1
        if self.steps == 5:
            self.gate.set()
        self.incomplete += incomplete(self.folder)
        trainer.strategy.barrier()


def files(folder: Path) -> dict[str, list[str]]:
    """Checkpoints, and what is beside each."""
    names = [name for name in os.listdir(folder) if name.endswith(".ckpt")] if folder.exists() else []
    return {name: sorted(path.name for path in folder.glob(f"{name}.ranks/*")) for name in names}


def incomplete(folder: Path, part: str = "") -> list[str]:
    """Checkpoints without all of their own files; not those that were replaced or removed while we looked.

    ``part`` is what is not sharded of one that is a folder.
    """
    found = []
    for name, beside in files(folder).items():
        if (folder / name).is_symlink():  # its files are those of the other
            continue
        before, beside = identity(folder / name / part), files(folder).get(name, beside)
        if before == identity(folder / name / part) is not None:
            found += [name] if {f"{before}.memory.rank{rank}.pt" for rank in (0, 1)} - {*beside} else []
    return found


def identity(path: Path) -> str | None:
    try:
        return str(torch.load(path, weights_only=True)["lightning_eff_rank_state"]["id"])
    except FileNotFoundError:
        return None


def run(
    folder: Path, failures: int = 0, hold: bool = False, resume: str | None = None, **arguments: Any
) -> dict[str, Any]:
    """A fit in which rank zero writes slowly, or nothing before the fifth step, and fails to write the first files.

    Rank one writes its own files more slowly still: a checkpoint must not be there before them.
    """
    write, left, wrote = io.write_staged, [OSError(28, "No space left on device")] * failures, []
    beside = later_files._write

    def slower(content: Any, path: str, save: Any) -> None:
        time.sleep(0.05 if path.endswith("rank1.pt") else 0)
        beside(content, path, save)
        names = os.listdir(folder)
        found["beside"].append((os.path.basename(path), threading.current_thread().name, sorted(names)))

    def slow(staged: Any, path: str) -> None:
        time.sleep(0.02)
        assert gate.wait(100)
        if left:
            raise left.pop()
        write(staged, path)
        wrote.append(os.path.basename(path))

    gate = threading.Event()
    if not hold:
        gate.set()
    io.write_staged, later_files._write = slow, slower
    memory, look = Memory(), Look(folder, gate)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    callback = AsyncCheckpoint(retries=0, **arguments)
    found: dict[str, Any] = {"error": None, "beside": []}
    warnings.filterwarnings("ignore", message=".*could not be written")
    try:
        L.seed_everything(1, verbose=False)
        trainer = fit(
            Model(), memory, look, callback, saver, max_epochs=2 if resume else 1, strategy=ddp(), devices=2,
            use_distributed_sampler=False, default_root_dir=folder, limit_val_batches=0, ckpt_path=resume,
        )  # fmt: skip
        found["io"] = type(trainer.strategy.checkpoint_io).__name__
    except RuntimeError as error:
        found["error"] = str(error)
    finally:
        io.write_staged, later_files._write = write, beside
    return found | {
        "steps": look.steps, "incomplete": look.incomplete + incomplete(folder),
        "wrote": wrote, "loaded": memory.loaded, "skipped": callback.skipped, "files": files(folder),
    }  # fmt: skip


def collectives(folder: Path, ours: bool, epochs: int) -> int:
    """How many a fit issues that never saves."""
    counts = 0
    modules = (torch.distributed, torch.distributed.distributed_c10d)
    inners = {(m, name): getattr(m, name) for m in modules for name in ("broadcast", "all_reduce", "barrier")}

    def counted(inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal counts
            counts += 1
            return inner(*args, **kwargs)

        return call

    try:
        for (module, name), inner in inners.items():
            setattr(module, name, counted(inner))
        fit(
            Model(), *([AsyncCheckpoint()] if ours else []), max_epochs=epochs, strategy=ddp(), devices=2,
            use_distributed_sampler=False, default_root_dir=folder, limit_val_batches=0,
        )  # fmt: skip
    finally:
        for (module, name), inner in inners.items():
            setattr(module, name, inner)
    return counts
