"""Faults by rank and step, never by luck."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import Self, override


class InjectedError(Exception):
    """Raised on purpose by `fail_at`."""


class FaultInjector(L.Callback):
    """Raises `InjectedError` once; built by `fail_at`."""

    def __init__(self, rank: int | None, step: int) -> None:
        self.rank = rank
        self.step = step
        self.hook = "on_train_batch_start"
        self.fired = False

    def in_hook(self, hook: str) -> Self:
        """Fail in another hook, e.g. `fail_at(step=4).in_hook("on_validation_batch_start")`."""
        if hook not in _HOOKS:
            raise ValueError(f"hook = {hook!r}; it must be one of {', '.join(_HOOKS)}")
        self.hook = hook
        return self

    def _called(self, hook: str, trainer: L.Trainer) -> None:
        due = hook == self.hook and trainer.global_step >= self.step and not trainer.sanity_checking
        if due and not self.fired and self.rank in (None, trainer.global_rank):
            self.fired = True
            raise InjectedError(f"rank {trainer.global_rank}, step {trainer.global_step}, {hook}")

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._called("on_train_batch_start", trainer)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._called("on_before_optimizer_step", trainer)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._called("on_train_batch_end", trainer)

    @override
    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._called("on_validation_batch_start", trainer)

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._called("on_validation_batch_end", trainer)


_HOOKS = [name for name in vars(FaultInjector) if name.startswith("on_")]


def fail_at(*, step: int, rank: int | None = None) -> FaultInjector:
    """A callback that raises `InjectedError` on `rank` (None: on every rank) when `step` optimizer steps are done.

    It fires at the start of the next batch, so whatever Lightning does for step `step` (logging, checkpoint) is done.
    """
    return FaultInjector(rank, step)
