"""The GPT as a LightningModule: AdamW, warm-up, and a cosine or a constant learning rate."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from examples.gpt.model import GPT, GPTConfig


class GPTModule(L.LightningModule):
    """Train a byte-level GPT; logs `train_loss`, `val_loss` (nats per byte) and `val_bpb` (bits per byte).

    Args:
        config: The shape of the model.
        lr: Learning rate after the warm-up.
        weight_decay: AdamW's decay, on matrices only: gains and biases are not decayed.
        betas: AdamW's decay rates of the two moments.
        schedule: What follows the warm-up: a cosine that ends with the training at `min_lr_ratio * lr`, or `lr`.
        warmup_steps: Steps in which the rate grows linearly to `lr`.
        min_lr_ratio: End of the cosine, as a fraction of `lr`.
        fused: Use the fused AdamW kernel.
    """

    def __init__(
        self,
        config: GPTConfig,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.1,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):  # as a checkpoint has it, see below
            config = GPTConfig(**config)
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
        # The shape as a dict: a checkpoint of plain data is read by torch.load(weights_only=True), without this file.
        self.save_hyperparameters(ignore="config")
        self.save_hyperparameters({"config": asdict(config)})
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.fused = fused
        self.model = GPT(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.model.loss(batch)
        self.log("val_loss", loss, batch_size=len(batch), sync_dist=True)
        self.log("val_bpb", loss / math.log(2), prog_bar=True, batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=self.fused)
        total = self._total_steps() if self.schedule == "cosine" else 0

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            if self.schedule == "constant":
                return 1.0
            progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
            return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("schedule='cosine' needs an end: give the Trainer max_steps or max_epochs")
        return int(total)
