"""What a training_step changes, set back."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from harness.runs import fit
from lightning_eff.strategies.fault_tolerant.manual.snapshot import StepSnapshot, with_buffers_of_its_own


class Pair(L.LightningModule):
    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)
        self.mean = nn.Linear(2, 2).requires_grad_(False)
        self.metric = MeanMetric()
        self.schedule, self.count, self.seen = schedule, 0, False

    def everything(self) -> dict[str, str]:
        optimizers: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        found = {
            "state": [value.tolist() for value in self.state_dict().values()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in self.parameters()],
            "open": [p.requires_grad for p in self.parameters()],
            "rates": [g["lr"] for optimizer in optimizers for g in optimizer.param_groups],
            "schedule": [value for name, value in schedule.state_dict().items() if name[0] != "_"],
            "count": self.count,
            "made": id(getattr(self, "made", None)),
            "steps": self.trainer.global_step,
            "random": (random.getstate(), np.random.get_state()[2]),
        }
        return {name: repr(value) for name, value in found.items()}

    def change_all(self, x: torch.Tensor) -> None:
        one, two = self.optimizers()  # type: ignore[misc, attr-defined]
        self.toggle_optimizer(one)
        loss = self.a(x).square().sum()
        self.manual_backward(loss)
        one.step()
        schedule: Any = self.lr_schedulers()
        schedule.step(*([loss.detach()] if self.schedule == "ReduceLROnPlateau" else []))
        for group in two.param_groups:
            group["lr"] *= 0.5
        self.mean.weight.data.lerp_(self.b.weight.data, 0.5)
        self.count += 1
        self.made = loss
        random.random()
        np.random.rand()

    def training_step(self, batch: torch.Tensor, batch_index: int) -> None:
        before = self.everything()
        snapshot = StepSnapshot(self.trainer, again=True)
        for _ in range(2):
            self.change_all(batch)
            changed = self.everything()
            assert [key for key in before if changed[key] == before[key]] == [], "the test changes all"
            snapshot.restore()
            assert self.everything() == before
        self._graphs_stay(batch)
        self.seen = True
        self.change_all(batch)
        self.untoggle_optimizer(self.optimizers()[0])  # type: ignore[index]

    def _graphs_stay(self, x: torch.Tensor) -> None:
        """A pass aside does not disturb a graph that is open."""
        expected = torch.autograd.grad(self.a(x).pow(3).sum(), list(self.a.parameters()))
        graph = self.a(x).pow(3).sum()
        norm: Any = self.a[1]
        statistics = norm.running_mean
        own = StepSnapshot(self.trainer, again=False)
        with_buffers_of_its_own(self)
        for parameter in self.parameters():
            parameter.data.add_(1.0)
        self.a(x)
        assert norm.running_mean is not statistics
        own.restore()
        assert norm.running_mean is statistics
        for gradient, wanted in zip(torch.autograd.grad(graph, list(self.a.parameters())), expected, strict=True):
            assert torch.equal(gradient, wanted)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.AdamW(self.a.parameters()), torch.optim.SGD(self.b.parameters(), lr=0.1)]
        make = getattr(torch.optim.lr_scheduler, self.schedule)
        more = {"StepLR": {"step_size": 1}, "OneCycleLR": {"max_lr": 1.0, "total_steps": 50}}.get(self.schedule, {})
        if self.schedule == "LambdaLR":
            more = {"lr_lambda": lambda step: 0.9**step}
        if self.schedule == "ReduceLROnPlateau":
            more = {"patience": 0, "threshold": 1e9}
        return optimizers, [make(optimizers[0], **more)]


@pytest.mark.parametrize("schedule", ["StepLR", "LambdaLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_all_is_set_back(schedule: str) -> None:
    torch.manual_seed(0)
    module = Pair(schedule)
    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)  # type: ignore[arg-type, var-annotated]
    fit(module, data=data, max_epochs=1)
    assert module.seen
    assert module.count == 3
