"""The smallest training, for the tests of what it runs in."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader

from harness.runs import fit


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(*callbacks, **options):
    """Three steps of a rank: who it was, and the weights."""
    model = Regression()
    trainer = fit(model, *callbacks, data=DataLoader(torch.randn(12, 2), batch_size=2), max_steps=3, **options)
    environment = type(trainer.strategy.cluster_environment)
    return trainer.global_rank, trainer.world_size, trainer.global_step, environment, model.layer.weight.detach()
