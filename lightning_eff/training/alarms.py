"""Alarms: what a monitor says when a run goes wrong, and how whoever acts on it hears of it.

A monitor sounds an alarm; whoever has the hook ``on_alarm`` (``hooks.HearsAlarms``) hears it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_eff.arguments import check_count, check_instance, check_number, check_text, check_trainer
from lightning_eff.training.hooks import HearsAlarms, tell


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
        check_text("source", self.source)
        check_count("step", self.step, least=0)
        check_number("severity", self.severity, least=0, most=1)


def sound(trainer: Trainer, alarm: Alarm) -> bool:
    """Let everybody with a method ``on_alarm`` hear an alarm, the callbacks in the order of ``trainer.callbacks``.

    It may be sounded by one rank alone, and in any hook: a listener that acts has to agree with the other ranks first.
    Nothing here is collective, and nothing waits for the device.

    Args:
        trainer: whose strategy, callbacks and module are told.
        alarm: what they are told.

    Returns:
        Whether anybody listens. If not, the monitor warns by itself.

    Raises:
        ValueError: ``trainer`` is no Trainer, or ``alarm`` no `Alarm`.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> sound(trainer, Alarm("my_monitor", step=100, message="the loss stands still"))
        False
    """
    check_trainer(trainer)
    check_instance("alarm", alarm, Alarm, "an Alarm")
    return tell(trainer, HearsAlarms, alarm) > 0
