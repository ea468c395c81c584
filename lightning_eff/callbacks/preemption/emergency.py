"""The state before the step in flight, saved by a rank that has failed, without asking any other."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Trainer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_eff.training.whole_files import whole_file


class StepWatch:
    """Knows whether an optimizer of this process may be within its update, where weights are neither old nor new."""

    def __init__(self) -> None:
        self.within = False
        self._handle: RemovableHandle | None = None

    def attach(self) -> None:
        """Until ``detach``."""
        self.detach()
        self._handle = register_optimizer_step_post_hook(self._after)

    def detach(self) -> None:
        """Doing it again is harmless."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.within = None, False

    def before_update(self) -> None:
        """The gradients are ready. (A pre-hook of the optimizer would come before forward and backward.)"""
        self.within = self._handle is not None

    def _after(self, *_: Any) -> None:
        self.within = False


def save_alone(trainer: Trainer, path: str) -> None:
    """Write a checkpoint of this rank's state; nobody is waited for.

    Where several ranks fail, the last one's file stays: replicas are equal.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    own = f"{path}.rank{trainer.global_rank}"
    with whole_file(own) as part:
        writer = trainer.strategy.checkpoint_io
        writer.save_checkpoint(checkpoint, part)
        if hasattr(writer, "flush"):  # AsyncCheckpointIO, which would write it later
            writer.flush()
    os.replace(own, path)
