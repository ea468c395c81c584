"""Checkpoints of the tests' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


class SaveBehind(Checkpoint):
    """Saves behind some batches, and in the validations behind some; behind all other callbacks."""

    def __init__(self, folder: Path, batches: tuple[int, ...], validations: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self.batches = batches
        self.validations = validations
        self.saved: list[str] = []

    def _save(self, trainer: L.Trainer, name: str) -> None:
        path = self.folder / f"behind-{name}.ckpt"
        if str(path) not in self.saved:
            self.saved.append(str(path))
            trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        behind = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if behind in self.batches:
            self._save(trainer, f"{behind:02d}")

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        behind = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if index == 1 and behind in self.validations:
            self._save(trainer, f"{behind:02d}-validation")
