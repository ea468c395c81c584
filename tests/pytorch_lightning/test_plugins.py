"""A Trainer of ``pytorch_lightning`` with the suite's plugin alone."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from harness.runs import quiet_trainer
from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage
from lightning_eff.pytorch_lightning.plugins import AsyncCheckpointIO


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.linspace(-1, 1, 32).view(-1, 4), batch_size=2)


def test_it_saves_and_loads_under_the_other_name(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    trainer = quiet_trainer(
        saver, trainer=pl.Trainer, plugins=[AsyncCheckpointIO()], max_steps=4, accelerator="cpu", log_every_n_steps=1,
        enable_checkpointing=True,
    )  # fmt: skip
    trainer.fit(Model())
    assert type(trainer.strategy.checkpoint_io) is AsyncCheckpointIO
    assert damage(tmp_path / "last.ckpt") is None
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
