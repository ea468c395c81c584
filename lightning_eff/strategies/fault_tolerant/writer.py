"""Loggers and folders when another replica begins to write: the same run goes on in the same files."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.utilities import _log_hyperparams

from lightning_eff.strategies.fault_tolerant.rendezvous import LeftBehindError
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.whole_files import whole_file


def places(trainer: Trainer) -> dict[str, list[Any]]:
    """Where this replica would write: the loggers' versions and the folders of checkpoints."""
    versions = [getattr(logger, "version", None) for logger in trainer.loggers]
    folders = [callback.dirpath for callback in _checkpoints(trainer)]
    return {
        "versions": [version if isinstance(version, int | str) else None for version in versions],
        "folders": [None if folder is None else str(folder) for folder in folders],
        # Not in the callback's state: without it, one that comes in would save the last step once more, alone.
        "saved": [getattr(callback, "_last_global_step_saved", 0) for callback in _checkpoints(trainer)],
    }


def adopt_places(trainer: Trainer, theirs: dict[str, list[Any]]) -> None:
    """Write where a peer does."""
    for logger, version in zip(trainer.loggers, theirs["versions"], strict=False):
        if version is not None and hasattr(logger, "_version"):
            logger._version = version
    for callback, folder in zip(_checkpoints(trainer), theirs["folders"], strict=False):
        callback.dirpath = folder
    for callback, step in zip(_checkpoints(trainer), theirs["saved"], strict=False):
        callback._last_global_step_saved = step


def begin_at_saved_step(trainer: Trainer) -> None:
    """A run that is resumed does not save the step that it begins at once more.

    ModelCheckpoint does not know that this one is saved, and would save it behind the first micro-batch of the next
    step, where a checkpoint has one replica's gradients and a resume gives them to all.
    """
    for callback in _checkpoints(trainer):
        callback._last_global_step_saved = trainer.global_step


def begin_to_write(trainer: Trainer) -> None:
    """This replica writes from now on. TensorBoard reads several files as one run; a CSV file is carried on."""
    for logger in trainer.loggers:
        if is_a(logger, CSVLogger):
            _carry_on(logger)
    _log_hyperparams(trainer)


def _carry_on(logger: CSVLogger) -> None:
    # A new CSVLogger in an old folder deletes what is there.
    path = os.path.join(logger.log_dir, "metrics.csv")
    if logger._experiment is not None or not os.path.isfile(path):
        return
    with open(path, newline="") as file:
        before = file.read()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # it will not be deleted
        experiment = logger.experiment
    experiment.metrics_keys = before.splitlines()[0].split(",") if before else []
    whole = before[: before.rfind("\n") + 1]  # a line that was cut is left out
    with whole_file(path) as part, open(part, "w", newline="") as file:
        file.write(whole)


class NewerCheckpoints:
    """Keeps a replica that was asleep from saving over what the others have saved meanwhile.

    It looks at checkpoints that others have written into the same folder since this process began: a run never goes
    back, so that one with more steps is of replicas that have gone on without this one.
    """

    def __init__(self) -> None:
        self._began = time.time()
        self._seen: dict[tuple[str, int], int] = {}  # by path and time: its steps

    def refuse_older(self, path: str | os.PathLike[str], step: int) -> None:
        """Before a checkpoint is saved.

        Args:
            path: of the checkpoint; local, others are not looked at.
            step: ``global_step`` of the checkpoint.

        Raises:
            LeftBehindError: another replica has saved a later step.
        """
        for other in Path(path).parent.glob("*.ckpt"):
            newest = self._steps_in(other)
            if newest > step:
                raise LeftBehindError(
                    f"{other} is of step {newest}, and this replica would save step {step}: the others went on without "
                    "it; start anew"
                )

    def note_own(self, path: str | os.PathLike[str], step: int) -> None:
        """After this replica has saved one itself, which is not to be read again."""
        file = Path(path)
        if file.is_file():
            self._seen[str(file), file.stat().st_mtime_ns] = step

    def _steps_in(self, checkpoint: Path) -> int:
        """Of a run's checkpoint; -1 if it is none, or is older than this process."""
        try:
            key = str(checkpoint), checkpoint.stat().st_mtime_ns
            if key not in self._seen and key[1] < self._began * 1e9:
                return -1
            if key not in self._seen:
                # Mapped and not read: only what is looked at comes into memory.
                found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
                self._seen[key] = int(found["global_step"])
        except Exception:  # it was just removed, or is another program's file
            return -1
        return self._seen[key]


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if is_a(callback, ModelCheckpoint)]
