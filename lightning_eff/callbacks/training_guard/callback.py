"""What to do when a run goes wrong, as a Lightning callback."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_number, check_text
from lightning_eff.callbacks.training_guard.checkpoint_files import forget_undone_checkpoints
from lightning_eff.callbacks.training_guard.growth import chosen_rules
from lightning_eff.callbacks.training_guard.listener import AlarmListener
from lightning_eff.callbacks.training_guard.rate_factor import RateFactor
from lightning_eff.callbacks.training_guard.rollback import (
    capture,
    check_memory,
    check_optimizers,
    check_rollback_support,
    restore,
)
from lightning_eff.callbacks.training_guard.rules import AlarmRule
from lightning_eff.callbacks.training_guard.run_snapshots import RunSnapshots
from lightning_eff.training.alarms import Alarm
from lightning_eff.training.hooks import Order
from lightning_eff.training.snapshots import Place
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import log_values, logs_now, save_surely, sort_callbacks

Action = Literal["warn", "stop", "rollback"]

# Into the log, not by `warnings`, which may keep the second of two alike to itself.
_tell = rank_zero_only(logging.getLogger(__name__).warning)


class TrainingDivergedError(RuntimeError):
    """The run went wrong again and again, and `TrainingGuard` has given up."""


class TrainingGuard(Callback):
    """Listens to alarms and acts on them, on all ranks together: warns, stops, or goes back to before the alarm.

    A rollback restores the newest snapshot from before the alarm, goes on with the batches that follow (those in
    between are skipped), draws other random numbers, and lowers the learning rate for a while. ``global_step`` goes
    back with the weights, so that ``max_steps`` and the schedulers count the steps that were not undone; batches,
    epochs and the loggers' steps go on.

    Alarms come from rules on the loss, from other callbacks (SpectralAlignmentMonitor, or any that calls
    :func:`~lightning_eff.callbacks.sound`) and from rules of your own, a few lines each
    (:class:`~lightning_eff.callbacks.AlarmRule`).

    Runs in: ``on_train_batch_end``, behind all other callbacks but checkpoints.
    Reads: the loss, after each optimizer step; the state of the run, every ``every_n_steps``.
    Changes: nothing without an alarm; a rollback changes the whole state of the training.
    Collectives: with several ranks one small asynchronous all-reduce a step; on an alarm, a gather of its words.
    Host syncs: none in a step; one read of a few numbers every ``read_every_n_steps``, a step after they were sent.
    Strategies: one device, DDP and its kin, FSDP2; ``"warn"`` and ``"stop"`` any.

    Args:
        action: ``"warn"``; ``"stop"``: a checkpoint is saved and the training ends (Trainer's ``min_steps`` and
            ``min_epochs`` hold); ``"rollback"``.
        rules: what is an alarm, beside those that other callbacks sound. None for ``NonFiniteLoss()`` and
            ``ExplodingLoss()``; ``"default"`` adds ``WeightGrowth()``, ``AttentionLogits()`` and a loss that rises
            slowly; an empty list for no rule.
        every_n_steps: steps between two snapshots, >= 1. Steps are the Trainer's ``global_step`` here and below.
        keep: snapshots that are kept, >= 2. Each is as large as the weights, the optimizer's state and the averages of
            other callbacks together, on each rank; the size is said when it is known.
        margin: a snapshot must be at least so many steps older than the alarm, >= 1, for an alarm speaks late. Where
            none is, at the start of a run, the oldest one is taken. ``margin + read_every_n_steps + 1`` must not be
            more than ``(keep - 1) * every_n_steps``.
        read_every_n_steps: the loss of a step is judged up to so many steps later, >= 1.
        storage: where the snapshots are: ``"cpu"`` (host memory, pinned for a GPU), ``"disk"`` (mapped files under
            ``folder``) or ``"model"`` (beside the weights).
        folder: for ``storage="disk"`` and for the checkpoint of ``"stop"``; by default the Trainer's
            ``default_root_dir``, and for the checkpoint that of ModelCheckpoint.
        lr_factor: the learning rates are multiplied by it after a rollback, in (0, 1]. A rollback while it is in force
            multiplies again.
        lr_steps: for so many steps, >= 1; None: to the end.
        max_rollbacks: the run is given up at the next alarm after so many rollbacks, >= 1.
        forget_after: the count begins anew when a run is so many steps past its last alarm, >= 1; None: never.
        min_severity: alarms of a lower severity than this are only warned of, in [0, 1].
        draw_anew: after a rollback random numbers (dropout, augmentation, the order of the next epoch) are others than
            in the steps that were undone, on ranks that draw alike still alike. They follow from the restored random
            state and the number of rollbacks. False: the same numbers come again, and with them what they broke.

    Logs: ``training_guard/alarms``; with ``"rollback"`` also ``training_guard/rollbacks``,
    ``training_guard/undone_steps`` and ``training_guard/lr_factor``. All count from the beginning of the run.

    A second alarm before the run has passed the step of the first one goes back further, to an older snapshot.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a rule that misses something, and, with
            ``"rollback"``, a strategy, an optimizer or a callback whose state cannot be put back.
        TrainingDivergedError: on all ranks, after ``max_rollbacks``, or where no snapshot is from before the alarm.
            The state of the newest snapshot from before it is restored and saved first, without one the oldest that
            there is; the error says which and where.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import TrainingGuard
        >>> guard = TrainingGuard(every_n_steps=200, keep=3, margin=100)
        >>> trainer = L.Trainer(max_steps=1, callbacks=[guard], logger=False)

    Source: ours. That going back and skipping batches passes a spike: Chowdhery et al., "PaLM", arXiv 2204.02311, 5.1.
    """

    order = Order.LAST  # what other callbacks do in a hook is done when a snapshot is taken or put back

    def __init__(
        self,
        action: Action = "rollback",
        rules: list[AlarmRule] | Literal["default"] | None = None,
        every_n_steps: int = 100,
        keep: int = 3,
        margin: int = 50,
        read_every_n_steps: int = 10,
        storage: Place = "cpu",
        folder: str | None = None,
        lr_factor: float = 0.5,
        lr_steps: int | None = 200,
        max_rollbacks: int = 3,
        forget_after: int | None = 1000,
        min_severity: float = 0.0,
        draw_anew: bool = True,
    ) -> None:
        check_choice("action", action, Action)
        chosen = chosen_rules(rules)
        check_count("every_n_steps", every_n_steps)
        check_count("keep", keep, least=2)
        check_count("margin", margin)
        check_count("read_every_n_steps", read_every_n_steps)
        reach = (keep - 1) * every_n_steps - read_every_n_steps - 1
        in_reach = f"at most (keep - 1) * every_n_steps - read_every_n_steps - 1 = {reach}: else no snapshot is so old"
        check("margin", margin, action != "rollback" or margin <= reach, in_reach)
        check_choice("storage", storage, Place)
        check_text("folder", folder, optional=True)
        check_number("lr_factor", lr_factor, above=0, most=1)
        check_count("lr_steps", lr_steps, optional=True)
        check_count("max_rollbacks", max_rollbacks)
        check_count("forget_after", forget_after, optional=True)
        check_number("min_severity", min_severity, least=0, most=1)
        check_flag("draw_anew", draw_anew)
        self.action: Action = action
        self.every_n_steps = every_n_steps
        self.margin = margin
        self.read_every_n_steps = read_every_n_steps
        self.folder = folder
        self.lr_factor = lr_factor
        self.lr_steps = lr_steps
        self.max_rollbacks = max_rollbacks
        self.forget_after = forget_after
        self.min_severity = min_severity
        self.draw_anew = draw_anew

        self.alarms = 0
        self.rollbacks = 0
        self.undone_steps = 0
        self._snapshots = RunSnapshots(keep, storage)
        self._listener = AlarmListener(chosen, read_every_n_steps)
        self._rates = RateFactor()
        self._rates_until: int | None = None
        self._in_a_row = 0
        self._last_alarm = -1  # its step
        self._last_restored = -1  # the step that the last rollback went to
        self._warned: dict[str, int] = {}  # source -> step
        self._step = 0
        self._due = 0
        self._stopped = False
        self._resumed = self._evaluates = False
        self._told = False  # how much memory the snapshots take
        self._fresh = self.state_dict()

    @property
    def rolls_back(self) -> bool:
        """Whether an alarm takes the run back to an earlier state, see ``hooks.py``."""
        return self.action == "rollback"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluates = stage != "fit"
        if self._evaluates:
            return
        if self.rolls_back:
            check_rollback_support(trainer, pl_module)
        self._listener.setup(trainer, pl_module)
        self._snapshots.window.folder = self.folder or trainer.default_root_dir
        sort_callbacks(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rolls_back:
            check_optimizers(trainer)
        if not self._resumed and trainer.global_step == 0:
            self._load(self._fresh)  # a new run begins; the callback may have been in another one before
        self._resumed = self._stopped = self._told = False
        self._listener.begin()
        self._snapshots.clear()
        self._step = trainer.global_step

    def on_alarm(self, trainer: Trainer, pl_module: LightningModule, alarm: Alarm) -> None:
        """Another callback sounds an alarm; on one rank or on several. It is acted on with the next values read."""
        if alarm.severity >= self.min_severity:
            self._listener.hear(alarm)
        else:
            self._warn(alarm, alarm.step)

    def expect_change(self) -> None:
        """Say that the data are others from the next step on, on one rank or on several: the rules begin anew."""
        self._listener.expect_change()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.rolls_back:
            self._rates.attach(trainer.optimizers)  # which a module may make anew in the midst of a fit
            if not self._snapshots.steps:
                self._take(trainer)
        self._listener.before_batch(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._listener.after_forward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._listener.after_forward()
        self._listener.add_loss(outputs)
        if trainer.global_step == self._step:
            return  # no optimizer has stepped
        self._step = step = trainer.global_step
        alarms = self._listener.after_step(trainer, pl_module, every_step=self.action == "warn")
        if self._in_a_row and self.forget_after is not None and step >= self._last_alarm + self.forget_after:
            self._in_a_row, self._last_alarm, self._last_restored = 0, -1, -1
        if alarms:
            self._act(trainer, alarms)
        elif self.rolls_back and step >= self._due:
            self._take(trainer)
        if self._rates_until is not None and self._step >= self._rates_until:
            self._rates.factor, self._rates_until = 1.0, None
        if logs_now(trainer):
            self._log(pl_module)

    def _act(self, trainer: Trainer, alarms: list[Alarm]) -> None:
        self.alarms += len(alarms)
        if self.action == "warn":
            for alarm in alarms:
                self._warn(alarm, self._step)
        elif self.rolls_back:
            self._roll_back(trainer, alarms[0])
        elif not self._stopped:
            self._stopped = True
            path = self._save(trainer)
            _tell(f"TrainingGuard stops the training: {_words(alarms[0])}. Its state is saved in {path}")
            trainer.should_stop = True

    def _warn(self, alarm: Alarm, step: int) -> None:
        """Once in a while for each source: what is wrong at one step is mostly wrong at the next."""
        if alarm.source not in self._warned or step >= self._warned[alarm.source] + self.every_n_steps:
            self._warned[alarm.source] = step
            _tell(f"TrainingGuard: {_words(alarm)}")

    def _take(self, trainer: Trainer) -> None:
        state = capture(trainer)
        if self._snapshots.steps and not self._told:  # the optimizer has its state now
            self._told = True
            check_memory(trainer, self._snapshots, state)
        self._snapshots.take(self._step, state)
        self._due = (self._step // self.every_n_steps + 1) * self.every_n_steps

    def _roll_back(self, trainer: Trainer, alarm: Alarm) -> None:
        limit = alarm.step - self.margin
        if alarm.step <= self._last_alarm:  # what was restored the last time has not helped
            limit = min(limit, self._last_restored - 1)
        old = [step for step in self._snapshots.steps if step <= limit]
        target = old[-1] if old else self._snapshots.steps[0]
        now, too_late = self._step, target >= alarm.step
        snapshot, counts = self._snapshots.read(target), self._counts()
        restore(trainer, snapshot, number=self.rollbacks + 1 if self.draw_anew else None)
        self._take_counts(counts)  # what has happened has happened
        self._listener.forget()
        self._snapshots.drop_after(target)
        self._step = target
        self._due = (target // self.every_n_steps + 1) * self.every_n_steps
        if too_late or self._in_a_row >= self.max_rollbacks:
            path = self._save(trainer)
            why = (
                f"TrainingGuard has no snapshot from before it, the oldest is of step {target}: a larger keep= or "
                "every_n_steps= reaches further back"
                if too_late
                else f"TrainingGuard(max_rollbacks={self.max_rollbacks}) gives up"
            )
            raise TrainingDivergedError(
                f"{_words(alarm)}, after {self._in_a_row} rollbacks in a row, and {why}. The state of step {target} is "
                f"restored and saved in {path}: resume from it with other settings"
            )
        self.rollbacks += 1
        self._in_a_row += 1
        self.undone_steps += now - target
        self._last_alarm, self._last_restored = alarm.step, target
        self._rates.factor *= self.lr_factor
        self._rates_until = None if self.lr_steps is None else target + self.lr_steps
        undone = forget_undone_checkpoints(trainer, snapshot.tree["files"], target)
        _tell(
            f"TrainingGuard: {_words(alarm)}. The run goes back from step {now} to step {target} and skips the batches "
            f"in between (rollback {self._in_a_row} of {self.max_rollbacks})"
            + (f"; the learning rate is multiplied by {self._rates.factor:g}" if self._rates.factor != 1 else "")
            + (f"; checkpoints of undone steps stay on disk: {', '.join(undone)}" if undone else "")
        )

    def _save(self, trainer: Trainer) -> str:
        callback = trainer.checkpoint_callback
        folder = self.folder or getattr(callback, "dirpath", None) or trainer.default_root_dir
        path = os.path.join(folder, f"training_guard-step={trainer.global_step}.ckpt")
        save_surely(trainer, path)
        return path

    def _log(self, pl_module: LightningModule) -> None:
        values: dict[str, float] = {"alarms": self.alarms}
        if self.rolls_back:
            values |= {"rollbacks": self.rollbacks, "undone_steps": self.undone_steps, "lr_factor": self._rates.factor}
        log_values(pl_module, "training_guard", values)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._listener.after_forward()
        self._rates.detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._listener.after_forward()
        self._rates.detach()
        self._snapshots.clear()
        self._evaluates = False

    def run_state(self) -> dict[str, Any]:
        """What the rules have seen, and the counts, which the guard itself keeps in a rollback."""
        return self.state_dict()

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from it; within a step, that step's end is yet to be seen."""
        self._load(state)
        if not within_step:
            self._step = trainer.global_step

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 2, **self._listener.state_dict(), **self._counts()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("TrainingGuard", state_dict, known=2)
        if not self._evaluates:  # `Trainer.test(ckpt_path=...)` gives callbacks their states too, and no run goes on
            self._load(state_dict)
            self._resumed = True

    def _load(self, state: dict[str, Any]) -> None:
        self._listener.load_state_dict(state)
        self._take_counts(state)

    def _counts(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "warned": dict(self._warned), "rate_factor": self._rates.factor}

    def _take_counts(self, state: dict[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._warned = dict(state["warned"])
        self._rates.factor = state["rate_factor"]

    def __getstate__(self) -> dict[str, Any]:
        window = self._snapshots.window
        return {**vars(self), "_snapshots": RunSnapshots(window.length, window.place)}

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        if not self.rolls_back:
            return {"alarms": ["Multiline", ["training_guard/alarms"]]}
        return {
            "alarms": ["Multiline", ["training_guard/alarms"]],
            "rollbacks": ["Multiline", ["training_guard/rollbacks"]],
            "undone steps": ["Multiline", ["training_guard/undone_steps"]],
            "factor of the learning rate": ["Multiline", ["training_guard/lr_factor"]],
        }


_COUNTS = ("alarms", "rollbacks", "undone_steps", "_in_a_row", "_last_alarm", "_last_restored", "_rates_until")


def _words(alarm: Alarm) -> str:
    return f"{alarm.source} at step {alarm.step}: {alarm.message}"
