"""A small convolutional network as a LightningModule. Its batch normalisation has buffers, which the GPT has not."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Halve the picture: convolution, normalisation, ReLU, pooling."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class DigitsModule(L.LightningModule):
    """Classify digits of 8 x 8 pixels; logs `train_loss`, `val_loss` and `val_acc`.

    Args:
        channels: Channels after the first of the two convolutions; the second has twice as many.
        lr: Learning rate of SGD with momentum.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
    """

    def __init__(self, channels: int = 16, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.model = nn.Sequential(
            conv_block(1, channels),
            conv_block(channels, 2 * channels),
            nn.Flatten(),
            nn.Linear(2 * channels * 2 * 2, 10),
        )
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
