"""What the tests of the guard share: its settings, and what goes wrong."""

from __future__ import annotations

from typing import Any

import lightning as L

from harness.faults import InjectedError
from lightning_eff.callbacks import (
    Alarm,
    sound,
)

GUARD: dict[str, Any] = {
    "rules": [],
    "every_n_steps": 2,
    "keep": 4,
    "margin": 1,
    "read_every_n_steps": 1,
    "lr_factor": 1.0,
    "lr_steps": None,
    "draw_anew": False,  # so that a run can be compared with another, bit by bit
}


class Sounder(L.Callback):
    """Sounds an alarm the first time that a step is done, on one rank alone."""

    def __init__(self, *steps: int, rank: int = 0, severity: float = 1.0, source: str = "test") -> None:
        self.steps = list(steps)
        self.rank = rank
        self.severity = severity
        self.source = source

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.steps and trainer.global_step == self.steps[0]:
            step = self.steps.pop(0)
            if trainer.global_rank == self.rank:
                sound(trainer, Alarm(self.source, step, "it is broken", self.severity))


class AtBatch(L.Callback):
    """Calls a function before a batch."""

    def __init__(self, index: int, function: Any) -> None:
        self.index = index
        self.function = function

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.index:
            self.function(trainer)


def kill(trainer: L.Trainer) -> None:
    raise InjectedError


class Poison(L.Callback):
    """Makes the weights NaN behind a step, once."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = None
            pl_module.head.weight.data.fill_(float("nan"))
