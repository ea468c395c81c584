"""Small models and runs for the tests of CheckpointAveraging and EMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from harness.runs import quiet_trainer
from tests.suite.models import Net
from tests.suite.runs import build_trainer
from tests.suite.table import SINGLE, Strategy


class Weights(L.Callback):
    """The weights after every update: `history[n]` after n of them, under clean names."""

    def __init__(self) -> None:
        self.history: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.history[trainer.global_step] = {n: p.detach().clone() for n, p in module.named_parameters()}


class Odd(L.LightningModule):
    """BatchNorm, a tied weight, a frozen weight, integer and float buffers, batches that are dicts."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(width, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.mean = MeanMetric()
        self.losses: list[Tensor] = []
        self.whole_validations: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(self.norm(self.first(x)))).squeeze(-1) * self.scale

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.scale += 1
        self.count += 1
        return F.mse_loss(self(batch["x"]), batch["y"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = F.mse_loss(self(batch["x"]), batch["y"])
        self.losses.append(loss)
        self.mean(loss)
        self.log("val_mean", self.mean)
        self.log("val_loss", loss, batch_size=len(batch["x"]))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.whole_validations.append(len(self.losses))
        self.losses.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def _loader(self, seed: int) -> torch.utils.data.DataLoader:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 4, generator=generator)
        data = [{"x": row, "y": row.sum()} for row in x]
        return torch.utils.data.DataLoader(data, batch_size=4, shuffle=seed == 0)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(0)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(1)

    test_dataloader = val_dataloader


def fit(
    folder: Path,
    *callbacks: L.Callback,
    module: Any = None,
    steps: int = 10,
    strategy: Strategy = SINGLE,
    resume: Path | str | None = None,
    **arguments: Any,
) -> tuple[L.Trainer, Any]:
    """Train a model of the contract suite, or another one, with these callbacks."""
    module = Net(optimizer="sgd") if module is None else module
    if not hasattr(module, "optimizer_count"):
        module.optimizer_count = 1
    trainer = build_trainer(folder, strategy, [], callbacks, module, steps, arguments)
    trainer.fit(module, ckpt_path=resume)
    return trainer, module


def loss_of(module: L.LightningModule, folder: Path) -> float:
    """Validate without any callback."""
    trainer = quiet_trainer(accelerator="cpu", default_root_dir=folder)
    return trainer.validate(module, verbose=False)[0]["val_loss"]


def averaged(path: Path) -> dict[str, Tensor]:
    """The weights in an averaged checkpoint."""
    return dict(torch.load(path, weights_only=True)["state_dict"])
