"""A network of `timm` made anew, nothing downloaded, on digits: the recipe for vision, with averaged BatchNorm.

python -m examples.scripts.timm_digits resnet10t      # pip install timm; any of its names
"""

from __future__ import annotations

import sys

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

import lightning_eff
from examples.digits import DigitsDataModule

try:
    import timm
except ImportError as error:
    raise ImportError(f"{error.name} cannot be found. It comes with: pip install timm") from error


class Classifier(L.LightningModule):
    """Any classifier of timm, on pictures of one channel that are made larger."""

    def __init__(self, name: str, size: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.size = size
        self.lr = lr
        self.model = timm.create_model(name, pretrained=False, num_classes=10, in_chans=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(F.interpolate(images, size=self.size, mode="bilinear"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)


def main(name: str = "resnet10t", steps: int = 230) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=steps, accelerator="auto", devices=1,
        callbacks=lightning_eff.recipe("vision", steps, resumable=False),
        logger=False, enable_checkpointing=False, num_sanity_val_steps=0, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(Classifier(name), datamodule=DigitsDataModule())
    return trainer


if __name__ == "__main__":
    print(
        {name: round(float(value), 3) for name, value in main(*sys.argv[1:2]).callback_metrics.items() if "acc" in name}
    )
