"""Loggers and folders when another replica begins to write: the same run goes on in the same files."""

from __future__ import annotations

import os
import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.utilities import _log_hyperparams


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


def begin_to_write(trainer: Trainer) -> None:
    """This replica writes from now on. TensorBoard reads several files as one run; a CSV file is carried on."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
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
    with open(f"{path}.part", "w", newline="") as file:
        file.write(whole)
    os.replace(f"{path}.part", path)


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
