"""What a GradScaler does to the gradients that a callback sees."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer


def gradient_scaler(trainer: Trainer) -> Any:
    """The precision plugin's GradScaler, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's fused kernel takes ``grad_scale`` and ``found_inf``, and Lightning leaves it to that."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def applied_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by in ``on_before_optimizer_step``, a 0-d tensor; None for nothing."""
    scaler = gradient_scaler(trainer)
    if scaler is None or not unscales_itself(optimizer):
        return None
    scale: Tensor = scaler._get_scale_async()  # get_scale() would wait for the device
    return scale
