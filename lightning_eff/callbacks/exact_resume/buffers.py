"""Buffers that each rank has for itself: BatchNorm's statistics, say, of which a checkpoint has those of rank zero."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_eff.training.dtensor import local

NO_BUFFERS: dict[str, Any] = {"buffers": {}, "sync": None}
_SYNC = "require_forward_param_sync"


def own_buffers(trainer: Trainer) -> dict[str, Any]:
    """Of a rank that is not the one whose buffers are in the checkpoint; by reference.

    And whether DDP would send rank zero's before its next pass, which it does not within a window of accumulation.
    """
    kept = {} if trainer.global_rank == 0 else trainer.lightning_module.state_dict(keep_vars=True)
    names = {name for name, _ in trainer.lightning_module.named_buffers()}
    return {
        "buffers": {name: local(value) for name, value in kept.items() if name in names},
        "sync": getattr(trainer.strategy.model, _SYNC, None),
    }


def set_own_buffers(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Set what `own_buffers` gave."""
    buffers = dict(trainer.lightning_module.named_buffers())
    with torch.no_grad():
        for name, value in saved["buffers"].items():
            if name in buffers:
                local(buffers[name]).copy_(value)
    if saved["sync"] is not None and hasattr(trainer.strategy.model, _SYNC):
        setattr(trainer.strategy.model, _SYNC, saved["sync"])
