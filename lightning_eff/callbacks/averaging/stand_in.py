"""An average in the place of the weights, with what belongs to it, for as long as it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_eff.callbacks.averaging import batch_norm
from lightning_eff.callbacks.averaging.average import Average
from lightning_eff.callbacks.averaging.trained_tensors import TrainedTensors
from lightning_eff.callbacks.averaging.weight_swap import WeightSwap
from lightning_eff.training.dtensor import local, reshard
from lightning_eff.training.hooks import ReadsWeights, tell


class StandIn:
    """Puts an average in the place of the weights, and takes it out again, whatever has happened in between.

    Whoever reads weights later is told before (``hooks.ReadsWeights``).

    Args:
        average: whose averages they are.
        tensors: of the model that they are in the place of.
        update_bn: training batches that BatchNorm's statistics under an average are taken from; None for the live ones.
    """

    def __init__(self, average: Average, tensors: TrainedTensors, update_bn: int | None) -> None:
        self.average = average
        self.tensors = tensors
        self.update_bn = update_bn
        self.inside: str | None = None
        """Label of the average that is in the place of the weights."""
        self._swap = WeightSwap()
        # BatchNorm's under each average: after how many collections they were taken, and where they lie.
        self._statistics: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def begin(self) -> None:
        """A run begins, or goes back."""
        self._statistics = {}

    def follow(self, module: LightningModule) -> None:
        """Know the model's parameters as they are, whatever others have renamed, replaced or unfrozen.

        A walk over the model: for where weights are read, and not for every step.
        """
        if not self.tensors.are_of(module):
            return
        renamed, gone = self.tensors.follow(module)
        if renamed or gone:
            self.average.follow(renamed, gone)
        self.unfreeze(self.tensors.unfrozen_by_others(module))

    def unfreeze(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Those that are trained for the first time have been the same in every snapshot until now."""
        for name, parameter in parameters.items():
            if self.tensors.unfreeze(name, parameter):
                self.average.add(name, local(parameter))

    def put_in(self, trainer: Trainer, label: str) -> None:
        """Put an average in the place of the weights; there has to be one."""
        module = trainer.lightning_module
        tell(trainer, ReadsWeights)
        self.follow(module)
        tensors = self.tensors.of(module)
        fresh = not self.update_bn or self._has_statistics(label)
        if not fresh:
            with torch.inference_mode(False):
                live = {name: buffer.clone() for name, buffer in batch_norm.statistics(module).items()}
            self._statistics[label] = (0, live)
        averages = ((tensors[name], average) for name, average in self.average.read(label, tensors, rounded=True))
        self._swap.put_in(chain(averages, self.statistics_of(module, label)))
        self.inside = label
        if not fresh:
            # The live statistics lie in `_statistics` now, and change places with those taken here when it is over.
            batch_norm.recompute_statistics(trainer, module, self.update_bn or 1)
            self._statistics[label] = (self.average.collected, self._statistics[label][1])

    def take_out(self, trainer: Trainer) -> None:
        """Put the live weights back. Doing it again is harmless."""
        self.inside = None
        if self._swap.active:
            try:
                tell(trainer, ReadsWeights)
            finally:
                reshard(trainer.lightning_module)
                self._swap.take_out()

    @contextmanager
    def in_place(self, trainer: Trainer, label: str) -> Iterator[None]:
        """Within the block an average is in the place of the weights."""
        try:
            self.put_in(trainer, label)
            yield
        finally:
            self.take_out(trainer)

    def stay(self, trainer: Trainer) -> None:
        """Put the main average in the place of the weights for good."""
        module = trainer.lightning_module
        tell(trainer, ReadsWeights)
        self.follow(module)
        tensors = self.tensors.of(module)
        with torch.no_grad():
            for name, average in self.average.read("", tensors, rounded=True):
                tensors[name].copy_(average)
            for buffer, other in self.statistics_of(module, ""):
                buffer.copy_(other)

    def _has_statistics(self, label: str) -> bool:
        return self._statistics.get(label, (0, {}))[0] == self.average.collected

    def statistics_of(self, module: LightningModule, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        """BatchNorm's buffers, each with the tensor that has what belongs to an average."""
        if self.update_bn:
            _, found = self._statistics.get(label, (0, {}))
            live = batch_norm.statistics(module)
            yield from ((live[name], other) for name, other in found.items() if name in live)

    def update_statistics(self, trainer: Trainer, label: str) -> None:
        """Take BatchNorm's statistics under an average, if they are wanted and not there."""
        if self.update_bn and self.average.collected and not self._has_statistics(label):
            with self.in_place(trainer, label):
                pass

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "inside": None, "_swap": WeightSwap()}
