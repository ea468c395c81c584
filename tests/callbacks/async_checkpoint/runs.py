"""A run with everything that changes behind a save's back, and what a save would have been without delay."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_eff.plugins.async_checkpoint import copies


class Model(L.LightningModule):
    """Has BatchNorm, whose statistics change in the forward, and validates."""

    def __init__(self, manual: bool | str = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.automatic_optimization = not manual
        self.manual = manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.trainer.optimizers[0] if self.manual == "raw" else self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.linspace(-1, 1, 96).view(-1, 4), batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.linspace(-2, 2, 16).view(-1, 4), batch_size=4)


class SaveInHook(Checkpoint):
    """Saves in one hook, and keeps what a save without any delay would hold."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        self.expected: dict[str, Any] = {}
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        name = f"{len(self.expected)}.ckpt"
        self.expected[name] = copied(trainer._checkpoint_connector.dump_checkpoint(False))
        trainer.save_checkpoint(self.folder / name)


class WritesWeights(L.Callback):
    """As no optimizer does, and without a word; past torch's count of writes, if it is through ``data``."""

    def __init__(self, first: int, data: bool = False) -> None:
        self.first, self.data = first, data

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        weight = module.net[0].weight
        if trainer.global_step >= self.first:
            with torch.no_grad():
                (weight.data if self.data else weight).add_(1)


def copied(value: Any) -> Any:
    """Without a tensor of the original."""
    if isinstance(value, dict):
        return type(value)((key, copied(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return type(value)(copied(entry) for entry in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


class LatestCopy:
    """In place of what copies late: as late as is allowed, when somebody says that he will write."""

    made: int = 0
    failed = False

    def __init__(self, pairs: Any) -> None:
        type(self).made += 1
        self.pairs = list(pairs)
        self.settled = threading.Event()

    def settle(self) -> None:
        for copy, source in self.pairs:
            copy.copy_(source)
        self.settled.set()

    def wait(self) -> None:
        assert self.settled.wait(20), "nobody has said that weights may be written"


def copy_late(monkeypatch: Any) -> None:
    """Weights and optimizer state are copied at the latest moment, small ones too."""
    monkeypatch.setattr(copies, "_SMALL", 0)
    monkeypatch.setattr(copies, "copy_later", lambda pairs: [LatestCopy(pairs)] if pairs else [])
    monkeypatch.setattr(LatestCopy, "made", 0)
