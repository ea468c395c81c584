"""Faults by rank and step, never by luck."""

from __future__ import annotations

from typing import get_args

from typing_extensions import Self

from lightning_eff.callbacks import FaultInjector
from lightning_eff.callbacks.fault_injector import Hook, InjectedError

__all__ = ["Failing", "InjectedError", "fail_at"]


class Failing(FaultInjector):
    """Raises `InjectedError` once; built by `fail_at`."""

    def in_hook(self, hook: str) -> Self:
        """Fail in another hook, e.g. `fail_at(step=4).in_hook("on_validation_batch_start")`."""
        if hook not in get_args(Hook):
            raise ValueError(f"hook = {hook!r}; it must be one of {', '.join(get_args(Hook))}")
        self.hook = hook  # type: ignore[assignment]
        return self


def fail_at(*, step: int, rank: int | None = None) -> Failing:
    """A callback that raises `InjectedError` on `rank` (None: on every rank) when `step` optimizer steps are done.

    It fires at the start of the next batch, so whatever Lightning does for step `step` (logging, checkpoint) is done.
    """
    return Failing("raise", step, rank)
