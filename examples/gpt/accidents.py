"""What goes wrong in a long run, on purpose and at known steps: part of the demo."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from examples.gpt.quiet import quick_trainer


class Accidents(Callback):
    """One batch is noise, and one bit of a weight flips. Batches are counted: what a rollback skips does not come back.

    Args:
        noise_at: the batch whose bytes are random; None for none. Its gradient norm is kept if it is logged.
        flip_at: the batch before which the highest bit of the exponent of a weight is set, as a fault of the memory
            would do it; None for none.
    """

    def __init__(self, noise_at: int | None = None, flip_at: int | None = None) -> None:
        self.noise_at = noise_at
        self.flip_at = flip_at
        self.norms = (float("nan"), float("nan"))
        """The gradient norm of the noise, and what ZClip has left of it."""
        self.not_finite = 0
        """Steps whose loss was not a number, or infinite."""

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, index: int) -> None:
        if index == self.noise_at:
            batch.copy_(torch.randint(256, batch.shape, generator=torch.Generator().manual_seed(0)))
        if index == self.flip_at:
            weight = pl_module.model.blocks[2].mlp.down.weight.data.view(-1)[:1]
            weight.copy_((weight.view(torch.int32) | (1 << 30)).view(torch.float32))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], batch: Tensor, index: int
    ) -> None:
        self.not_finite += int(not outputs["loss"].isfinite())
        if index == self.noise_at:
            metrics = trainer.callback_metrics
            self.norms = tuple(metrics[f"zclip/{name}"].item() for name in ("grad_norm", "grad_norm_clipped"))


def unguarded(config: GPTConfig, data: TextDataModule, steps: int) -> int:
    """Train with a bit that flips half way, and without a guard: how many losses were not finite from there on."""
    accidents = Accidents(flip_at=steps // 2)
    quick_trainer(steps, callbacks=[accidents]).fit(GPTModule(config, lr=3e-3, warmup_steps=5), datamodule=data)
    return accidents.not_finite
