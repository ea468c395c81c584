"""Alarms and who hears them."""

from __future__ import annotations

import lightning as L
import pytest

from harness.runs import quiet_trainer
from lightning_eff.training.alarms import Alarm, sound


class Listener(L.Callback):
    def __init__(self) -> None:
        self.heard = []

    def on_alarm(self, trainer, pl_module, alarm) -> None:
        self.heard.append((trainer, pl_module, alarm))


def test_every_listener_hears_the_alarm():
    one, deaf, other = Listener(), L.Callback(), Listener()
    trainer, alarm = quiet_trainer(one, deaf, other, accelerator="cpu"), Alarm("loss", 7, "too high", 0.5)
    assert sound(trainer, alarm) is True
    assert one.heard == other.heard == [(trainer, trainer.lightning_module, alarm)]


def test_an_alarm_that_nobody_hears_says_so():
    assert sound(quiet_trainer(L.Callback(), accelerator="cpu"), Alarm("loss", 7, "too high")) is False


@pytest.mark.parametrize(
    ("argument", "value"), [("source", ""), ("step", -1), ("severity", 1.5), ("severity", float("nan"))]
)
def test_bad_values_are_met_at_the_door(argument, value):
    values = {"source": "loss", "step": 3, "message": "too high", "severity": 1.0}
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        Alarm(**{**values, argument: value})
