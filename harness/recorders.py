"""Callbacks that write down what a run did."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override


class Losses(L.Callback):
    """What ``training_step`` returned for each batch; nobody waits for it before the run is over."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.tensors.append(outputs["loss"].detach())

    @property
    def values(self) -> list[float]:
        """As numbers."""
        return [loss.item() for loss in self.tensors]


class Alarms(L.Callback):
    """Every alarm that was sounded."""

    def __init__(self) -> None:
        self.alarms: list[Any] = []

    def on_alarm(self, trainer: L.Trainer, pl_module: L.LightningModule, alarm: Any) -> None:
        """Called by `sound`."""
        self.alarms.append(alarm)

    @property
    def steps(self) -> list[int]:
        """When, in optimizer steps that were done."""
        return [alarm.step for alarm in self.alarms]


class Reduced(L.Callback):
    """The `bytes` and `elements` that DDP reduces in each batch. It stands behind what wraps the model at the start."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.elements: list[int] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.model.register_comm_hook(self, _count_and_reduce)  # type: ignore[union-attr, operator]

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.bytes.append(0)
        self.elements.append(0)


def _count_and_reduce(counter, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    counter.bytes[-1] += bucket.buffer().nbytes
    counter.elements[-1] += bucket.buffer().numel()
    return allreduce_hook(None, bucket)
