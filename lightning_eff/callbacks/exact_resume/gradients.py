"""Gradients that no optimizer step has used yet: those of a window of accumulation that is not full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.dtensor import local


class UnusedGradients:
    """Knows which optimizers have stepped in the batch in hand: what the others' parameters hold is still needed.

    The gradients are saved, and the window does not begin again from its first batch instead: that would run the
    batches of the window twice through all that counts or averages them (BatchNorm, metrics, other callbacks).
    """

    def __init__(self) -> None:
        self._stepped: set[int] = set()
        self._handles: list[Any] = []

    def attach(self, trainer: Trainer) -> None:
        """When the optimizers are there."""
        self.detach()
        for index, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_post_hook(lambda *_, index=index: self._stepped.add(index)))

    def stop(self) -> None:
        """Leave the optimizers; doing it again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def detach(self) -> None:
        """Leave, and know nothing."""
        self.stop()
        self._stepped = set()

    def begin_batch(self) -> None:
        """A batch begins."""
        self._stepped = set()

    def state(self, trainer: Trainer, batches: int | None) -> dict[str, Tensor]:
        """By clean names, this rank's part; by reference.

        Args:
            trainer: whose fit is running.
            batches: of the epoch that are behind; None between two epochs.
        """
        window = trainer.accumulate_grad_batches
        automatic = trainer.lightning_module.automatic_optimization
        if automatic and (not batches or batches % window == 0 or batches == trainer.num_training_batches):
            return {}
        return {
            name: local(parameter.grad)
            for name, parameter in self._parameters(trainer)
            if parameter.grad is not None and not parameter.grad.is_sparse
        }

    def set(self, trainer: Trainer, saved: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        parameters = clean_named_parameters(trainer.lightning_module)
        with torch.no_grad():
            for name, gradient in saved.items():
                if name in parameters:
                    parameter = parameters[name]
                    parameter.grad = torch.zeros_like(parameter, dtype=gradient.dtype)
                    local(parameter.grad).copy_(gradient)

    def _parameters(self, trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
        waiting = [optimizer for index, optimizer in enumerate(trainer.optimizers) if index not in self._stepped]
        wanted = {id(p) for optimizer in waiting for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in clean_named_parameters(trainer.lightning_module).items():
            if id(parameter) in wanted:
                yield name, parameter
