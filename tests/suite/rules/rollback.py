"""Beside a guard that takes a run back: what broke it does not come again, and its snapshots cost no waiting."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from harness.operators import OperatorCounter
from lightning_eff.callbacks import Alarm, TrainingGuard, sound
from lightning_eff.training.hooks import HasRunState
from tests.suite.device import generator_state
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, fit
from tests.suite.table import Row


@rule()
def a_rollback_draws_other_numbers(row: Row, place: Place) -> None:
    """A step that is made again draws other random numbers: those that it drew may have been what broke the run."""
    callback, draws = row.build(), _Draws()
    around: list[L.Callback] = [draws, _Sounds(7)]
    if not isinstance(callback, TrainingGuard):
        around.append(TrainingGuard(rules=[], every_n_steps=2, keep=4, margin=1, read_every_n_steps=1))
    fit(row, place.folder, callback=callback, around=around, model_arguments={"dropout": 0.5})
    again = {step: states for step, states in draws.states.items() if len(states) > 1}
    assert again, "no step was made again: the run has not gone back"
    same = [step for step, states in again.items() if len({bytes(s.tolist()) for s in states}) < len(states)]
    assert not same, f"after the rollback steps {same} draw what they drew before"


@rule()
def a_snapshot_waits_for_nothing(row: Row, place: Place) -> None:
    """What a snapshot takes of a callback is asked for without a host sync, and its tensors are the callback's own."""
    looks = _TakesState(row.build())
    fit(row, place.folder, callback=looks.callback, around=[looks])
    assert looks.syncs == 0, f"{looks.syncs} host syncs when the state is taken"
    assert looks.copied == 0, f"{looks.copied} tensors are copies, and a copy to the host waits for the device"


class _Draws(L.Callback):
    """The random state in front of each batch, by the step that it leads to."""

    def __init__(self) -> None:
        self.states: dict[int, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.states.setdefault(trainer.global_step + 1, []).append(generator_state())


class _Sounds(L.Callback):
    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = None
            sound(trainer, Alarm("suite", trainer.global_step, "a test"))


class _TakesState(L.Callback):
    """Takes the state behind the ninth step."""

    def __init__(self, callback: L.Callback) -> None:
        self.callback: Any = callback
        self.syncs = self.copied = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != 9:
            return
        has_own = isinstance(self.callback, HasRunState)
        take = self.callback.run_state if has_own else self.callback.state_dict
        with OperatorCounter() as counter:
            state = take()
        self.syncs = counter.host_syncs
        known = set(_addresses(state))
        self.copied = sum(address not in known for address in _addresses(take()))


def _addresses(state: Any) -> list[int]:
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [address for entry in state for address in _addresses(entry)]
    return [state.data_ptr()] if isinstance(state, Tensor) and state.numel() else []
