"""Collects the alarms of a run: those of rules on its numbers, and those that callbacks sound."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_eff.callbacks.training_guard.late_values import LateValues, Row
from lightning_eff.callbacks.training_guard.rate_history import RateHistory, highest_rate
from lightning_eff.callbacks.training_guard.rules import AlarmRule
from lightning_eff.training.alarms import Alarm
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.run_parts import is_last_batch
from lightning_eff.training.trainer import accumulates, loss_of


class AlarmListener:
    """Asks the rules about each step, and brings the alarms of all ranks together.

    What it returns is the same on all ranks at the same step, so that a decision from it is one of all ranks.

    Collectives: those of `LateValues`; where an alarm was sounded by a callback, a gather of its words.

    Args:
        rules: what is an alarm.
        every: a step is judged up to so many steps later, >= 1.
    """

    def __init__(self, rules: Sequence[AlarmRule], every: int) -> None:
        self.rules = list(rules)
        self._values = LateValues(len(self.rules) + 3, every)
        self._rates = RateHistory()
        self._losses: list[Tensor] = []  # of the batches since the last step
        self._window: list[Tensor] = []  # such, of the run that is resumed
        self._rank_state: RankState | None = None
        self._heard: list[Alarm] = []  # on this rank, not yet handed out
        self._announced = False  # here, since the last step: the data has changed

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit is set up. A checkpoint between two batches of a step has each rank's losses of that step."""
        for rule in self.rules:
            rule.setup(trainer, pl_module)
        if not accumulates(trainer, pl_module):
            return
        if self._rank_state is None:
            self._rank_state = RankState("training_guard", save=self._save_window, load=self._load_window)
        self._rank_state.attach(trainer.strategy)

    def _save_window(self) -> dict[str, Any]:
        return {"losses": [loss.detach().float().mean() for loss in self._losses]}

    def _load_window(self, saved: dict[str, Any] | None) -> None:
        self._window = [] if saved is None else saved["losses"]

    def hear(self, alarm: Alarm) -> None:
        """A callback sounds an alarm, perhaps on this rank alone."""
        self._heard.append(alarm)

    def expect_change(self) -> None:
        """The data is other than before, on this rank at least: the rules begin anew with the next step."""
        self._announced = True

    def before_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A batch of training begins."""
        for rule in self.rules:
            rule.before_batch(trainer, pl_module)

    def after_forward(self) -> None:
        """The rules look at no forward pass any longer."""
        for rule in self.rules:
            rule.after_forward()

    def add_loss(self, outputs: Any) -> None:
        """What ``training_step`` has returned for a batch, as ``on_train_batch_end`` gets it."""
        loss = loss_of(outputs)
        if loss is not None:
            self._losses.append(loss)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, *, every_step: bool) -> list[Alarm]:
        """An optimizer has stepped: take its numbers, judge the earlier ones that have come in.

        Args:
            trainer: whose step has ended.
            pl_module: the trained module.
            every_step: go on after a step with alarms.

        Returns:
            The alarms, earliest step first.
        """
        loss = self._mean_loss(pl_module)
        self._losses = []
        values = [rule.value(trainer, pl_module, loss) for rule in self.rules]
        about = [highest_rate(trainer.optimizers), float(self._announced), float(bool(self._heard))]
        self._announced = False
        rows = self._values.record(trainer.global_step, [*values, *about], trainer.strategy.root_device)
        if _is_last_step(trainer):
            rows += self._values.flush()
        return self._judge(rows, every_step)

    def _mean_loss(self, pl_module: LightningModule) -> Tensor | None:
        if not self._losses:
            return None
        total = torch.stack([loss.to(self._losses[-1].device).float().mean() for loss in self._losses]).sum()
        # In automatic optimization Lightning has divided each by the number of batches of a step.
        return total if pl_module.automatic_optimization else total / len(self._losses)

    def _judge(self, rows: list[Row], every_step: bool) -> list[Alarm]:
        alarms: list[Alarm] = []
        for step, (*values, rate, announced, heard) in rows:
            if self._rates.warms_again(rate) or announced:
                for rule in self.rules:
                    rule.begin_anew()
            for rule, value in zip(self.rules, values, strict=True):
                message = None if value is None else rule.judge(step, value)
                if message is not None:
                    alarms.append(Alarm(rule.name, step, message))
            if heard:
                alarms += self._gather_heard()
            if alarms and not every_step:
                break
        return sorted(alarms, key=lambda alarm: alarm.step)

    def _gather_heard(self) -> list[Alarm]:
        heard, self._heard = [asdict(alarm) for alarm in self._heard], []
        if dist.is_initialized() and dist.get_world_size() > 1:
            lists: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(lists, heard)
            heard = [alarm for of_rank in lists for alarm in of_rank]
        return list(dict.fromkeys(Alarm(**alarm) for alarm in heard))

    def begin(self) -> None:
        """A fit begins: batches of one that was broken off count where it is resumed, as does what that has heard."""
        self._losses, self._window = self._window, []

    def forget(self) -> None:
        """A run has gone back: neither what was heard before counts, nor batches before."""
        self._losses, self._heard, self._announced = [], [], False

    def state_dict(self) -> dict[str, Any]:
        """What the rules have seen and what they have not yet seen, and alarms heard here and not yet handed out."""
        return {
            "rules": [rule.state_dict() for rule in self.rules],
            "values": self._values.state_dict(),
            "rates": self._rates.state_dict(),
            "heard": [asdict(alarm) for alarm in self._heard],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        if len(state["rules"]) == len(self.rules):
            for rule, saved in zip(self.rules, state["rules"], strict=True):
                rule.load_state_dict(saved)
        else:
            warnings.warn("TrainingGuard has other rules than in the checkpoint: they begin anew", stacklevel=4)
        values, rates = state["values"], state.get("rates")
        if rates is None:  # of a state of version 1
            values = {**values, "block": _widened(values["block"]), "landing": _widened(values["landing"])}
        self._values.load_state_dict(values)
        self._rates.load_state_dict(rates)
        self._losses, self._heard = [], [Alarm(**alarm) for alarm in state["heard"]]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_losses": [], "_rank_state": None}


def _widened(numbers: Tensor) -> Tensor:
    """With the columns of the rate and of an announced change, which a state of version 1 does not have: none there."""
    if numbers.ndim != 2:
        return numbers
    none = numbers.new_zeros(len(numbers), 2)
    halves = [torch.cat([half[:, :-1], none, half[:, -1:]], 1) for half in numbers.chunk(2, 1)]  # sums, and how many
    return torch.cat(halves, 1)


def _is_last_step(trainer: Trainer) -> bool:
    """Whether no other step follows in which the numbers of this one could be read."""
    loop = trainer.fit_loop
    if loop.max_steps != -1 and trainer.global_step >= loop.max_steps:
        return True
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= loop.max_epochs  # type: ignore[operator]
    return last_epoch and is_last_batch(trainer)
