"""Alarms: what a monitor says when a run goes wrong, and how whoever acts on it hears of it.

A monitor sounds an alarm; every callback that has a method ``on_alarm`` hears it:

    def on_alarm(self, trainer, pl_module, alarm: Alarm) -> None: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from lightning.pytorch import LightningModule, Trainer

from lightning_eff.arguments import check


@dataclass(frozen=True)
class Alarm:
    """Something is wrong with a run.

    Attributes:
        source: who says so: the method's stem, ``"spectral_alignment"`` for instance; not empty.
        step: the ``global_step`` at which the sign was seen. It may have been seen later than the harm was done.
        message: what is wrong, in words for the log, with the numbers.
        severity: how bad it is, in [0, 1]. What it means is the source's own.

    Raises:
        ValueError: an empty source, a negative step or a severity outside [0, 1].

    Example:
        >>> Alarm("spectral_alignment", 1200, "3 of 24 layers have lost their sign diversity", severity=0.125)
        Alarm(source='spectral_alignment', step=1200, message='3 of 24 layers ... diversity', severity=0.125)
    """

    source: str
    step: int
    message: str
    severity: float = 1.0

    def __post_init__(self) -> None:
        check("source", self.source, isinstance(self.source, str) and self.source != "", "a word")
        check("step", self.step, isinstance(self.step, int) and self.step >= 0, "an integer, at least 0")
        in_range = isfinite(self.severity) and 0 <= self.severity <= 1
        check("severity", self.severity, in_range, "a number from 0 to 1")


def sound(trainer: Trainer, pl_module: LightningModule, alarm: Alarm) -> bool:
    """Let every callback with a method ``on_alarm`` hear an alarm, in the order of ``trainer.callbacks``.

    It may be sounded by one rank alone, and in any hook: a listener that acts has to agree with the other ranks first.
    Nothing here is collective, and nothing waits for the device.

    Returns:
        Whether anybody listens. If not, the monitor warns by itself.
    """
    listeners = [callback.on_alarm for callback in trainer.callbacks if hasattr(callback, "on_alarm")]  # type: ignore[attr-defined]
    for listener in listeners:
        listener(trainer, pl_module, alarm)
    return bool(listeners)
