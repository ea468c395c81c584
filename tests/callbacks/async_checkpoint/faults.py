"""A small run in a process of its own, to be killed, starved of disk, or given a folder that it may not write to."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from harness.runs import fit, quiet_lightning
from lightning_eff.callbacks import AsyncCheckpoint


class Model(L.LightningModule):
    """Its weights say of which step they are: all of them are 1 / 1,024 larger after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(8)])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -sum(weight.sum() for weight in self.weights)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1 / 1024, momentum=1e-30)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(100_000, 1))


def is_right(checkpoint: dict[str, Any]) -> bool:
    """Whether all weights are those of the step that a checkpoint says."""
    weights = torch.cat(list(checkpoint["state_dict"].values()))
    momentum = torch.cat([state["momentum_buffer"] for state in checkpoint["optimizer_states"][0]["state"].values()])
    return bool((weights == checkpoint["global_step"] / 1024).all()) and bool((momentum == -1).all())


def main(settings: dict[str, Any]) -> None:
    """Save after each step, until something happens."""
    torch.set_num_threads(1)
    quiet_lightning("Checkpoint directory")
    folder = Path(settings["folder"])
    if "file_size" in settings:  # a disk that is full: no file may be longer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_size"], settings["file_size"]))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
    callback = AsyncCheckpoint(retry_seconds=0.0, **settings.get("arguments", {}))
    fit(Model(settings["width"]), callback, saver, max_steps=settings["steps"], default_root_dir=folder)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
