"""What to do when a run goes wrong, as a Lightning callback."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from lightning_eff.arguments import check, is_count, readable_size
from lightning_eff.callbacks.training_guard.checkpoint_files import forget_undone_checkpoints
from lightning_eff.callbacks.training_guard.listener import AlarmListener
from lightning_eff.callbacks.training_guard.rate_factor import RateFactor
from lightning_eff.callbacks.training_guard.rollback import capture, check_optimizers, check_rollback_support, restore
from lightning_eff.callbacks.training_guard.rules import AlarmRule, ExplodingLoss, NonFiniteLoss
from lightning_eff.callbacks.training_guard.run_snapshots import RunSnapshots, tensor_bytes
from lightning_eff.training.alarms import Alarm
from lightning_eff.training.snapshots import Place

Action = Literal["warn", "stop", "rollback"]

# Into the log, not by `warnings`, which may keep the second of two alike to itself.
_tell = rank_zero_only(logging.getLogger(__name__).warning)


class TrainingDivergedError(RuntimeError):
    """The run went wrong again and again, and `TrainingGuard` has given up."""


class TrainingGuard(Callback):
    """Listens to alarms and acts on them, on all ranks together: warns, stops, or goes back to before the alarm.

    A rollback restores the newest snapshot from before the alarm, goes on with the batches that follow (those in
    between are skipped), and lowers the learning rate for a while. ``global_step`` goes back with the weights, so that
    ``max_steps`` and the schedulers count the steps that were not undone; batches, epochs and the loggers' steps go on.

    Alarms come from rules on the loss, from other callbacks (SpectralAlignmentMonitor, or any that calls
    :func:`~lightning_eff.training.alarms.sound`) and from rules of your own, a few lines each
    (:class:`~lightning_eff.callbacks.training_guard.rules.AlarmRule`).

    Runs in: ``on_train_batch_end``, behind all other callbacks but checkpoints.
    Reads: the loss, after each optimizer step; the state of the run, every ``every_n_steps``.
    Changes: nothing without an alarm; a rollback changes the whole state of the training.
    Collectives: with several ranks one small asynchronous all-reduce a step; on an alarm, a gather of its words.
    Host syncs: none in a step; one read of a few numbers every ``check_every_n_steps``, a step after they were sent.
    Strategies: one device, DDP and its kin, FSDP2; ``"warn"`` and ``"stop"`` any.

    Args:
        action: ``"warn"``; ``"stop"``: a checkpoint is saved and the training ends (Trainer's ``min_steps`` and
            ``min_epochs`` hold); ``"rollback"``.
        rules: what is an alarm, beside those that other callbacks sound. None for ``NonFiniteLoss()`` and
            ``ExplodingLoss()``; an empty list for no rule.
        every_n_steps: steps between two snapshots, >= 1. Steps are the Trainer's ``global_step`` here and below.
        keep: snapshots that are kept, >= 2. Each is as large as the weights, the optimizer's state and the averages of
            other callbacks together, on each rank; the size is said when it is known.
        margin: a snapshot must be at least so many steps older than the alarm, >= 1, for an alarm speaks late. Where
            none is, at the start of a run, the oldest one is taken. ``margin + check_every_n_steps + 1`` must not be
            more than ``(keep - 1) * every_n_steps``.
        check_every_n_steps: the loss of a step is judged up to so many steps later, >= 1.
        device: where the snapshots are: ``"cpu"`` (host memory, pinned for a GPU), ``"disk"`` (mapped files under
            ``folder``) or ``"model"`` (beside the weights).
        folder: for ``device="disk"`` and for the checkpoint of ``"stop"``; by default the Trainer's
            ``default_root_dir``, and for the checkpoint that of ModelCheckpoint.
        lr_factor: the learning rates are multiplied by it after a rollback, in (0, 1]. A rollback while it is in force
            multiplies again.
        lr_steps: for so many steps, >= 1; None: to the end.
        max_rollbacks: the run is given up at the next alarm after so many rollbacks, >= 1.
        forget_after: the count begins anew when a run is so many steps past its last alarm, >= 1; None: never.
        min_severity: alarms of a lower severity than this are only warned of, in [0, 1].

    Logs: ``training_guard/alarms``; with ``"rollback"`` also ``training_guard/rollbacks``,
    ``training_guard/undone_steps`` and ``training_guard/lr_factor``. All count from the beginning of the run.

    A second alarm before the run has passed the step of the first one goes back further, to an older snapshot.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a rule that misses something, and, with
            ``"rollback"``, a strategy, an optimizer or a callback whose state cannot be put back.
        TrainingDivergedError: on all ranks, after ``max_rollbacks`` or where no snapshot is from before the alarm. The
            newest good state is restored and saved first; the error says where.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import TrainingGuard
        >>> guard = TrainingGuard(every_n_steps=200, keep=3, margin=100)
        >>> trainer = L.Trainer(max_steps=1, callbacks=[guard], logger=False)

    Source: ours. That going back and skipping batches passes a spike: Chowdhery et al., "PaLM", arXiv 2204.02311, 5.1.
    """

    def __init__(
        self,
        action: Action = "rollback",
        rules: list[AlarmRule] | None = None,
        every_n_steps: int = 100,
        keep: int = 3,
        margin: int = 50,
        check_every_n_steps: int = 10,
        device: Place = "cpu",
        folder: str | None = None,
        lr_factor: float = 0.5,
        lr_steps: int | None = 200,
        max_rollbacks: int = 3,
        forget_after: int | None = 1000,
        min_severity: float = 0.0,
    ) -> None:
        check("action", action, action in get_args(Action), f"one of {get_args(Action)}")
        are_rules = rules is None or all(isinstance(rule, AlarmRule) for rule in rules)
        check("rules", rules, are_rules, "None or a list of AlarmRule objects")
        check("every_n_steps", every_n_steps, is_count(every_n_steps), "an integer, at least 1")
        check("keep", keep, is_count(keep) and keep >= 2, "an integer, at least 2")
        check("margin", margin, is_count(margin), "an integer, at least 1")
        check("check_every_n_steps", check_every_n_steps, is_count(check_every_n_steps), "an integer, at least 1")
        reach = (keep - 1) * every_n_steps - check_every_n_steps - 1
        in_reach = f"at most (keep - 1) * every_n_steps - check_every_n_steps - 1 = {reach}: else no snapshot is so old"
        check("margin", margin, action != "rollback" or margin <= reach, in_reach)
        check("device", device, device in get_args(Place), f"one of {get_args(Place)}")
        check("lr_factor", lr_factor, 0 < lr_factor <= 1, "in (0, 1]")
        check("lr_steps", lr_steps, lr_steps is None or is_count(lr_steps), "None or an integer, at least 1")
        check("max_rollbacks", max_rollbacks, is_count(max_rollbacks), "an integer, at least 1")
        usable = forget_after is None or is_count(forget_after)
        check("forget_after", forget_after, usable, "None or an integer, at least 1")
        check("min_severity", min_severity, 0 <= min_severity <= 1, "a number from 0 to 1")
        self.action: Action = action
        self.every_n_steps = every_n_steps
        self.margin = margin
        self.check_every_n_steps = check_every_n_steps
        self.folder = folder
        self.lr_factor = lr_factor
        self.lr_steps = lr_steps
        self.max_rollbacks = max_rollbacks
        self.forget_after = forget_after
        self.min_severity = min_severity

        self.alarms = 0
        self.rollbacks = 0
        self.undone_steps = 0
        self._snapshots = RunSnapshots(keep, device)
        self._listener = AlarmListener(
            [NonFiniteLoss(), ExplodingLoss()] if rules is None else rules, check_every_n_steps
        )
        self._rates = RateFactor()
        self._rates_until: int | None = None
        self._in_a_row = 0
        self._last_alarm = -1  # its step
        self._last_restored = -1  # the step that the last rollback went to
        self._warned: dict[str, int] = {}  # source -> step
        self._step = 0
        self._due = 0
        self._stopped = False
        self._resumed = False
        self._told = False  # how much memory the snapshots take
        self._fresh = self.state_dict()

    @property
    def rolls_back(self) -> bool:
        """Whether it goes back to an earlier state of the run on an alarm; see ``training/hooks.py``."""
        return self.action == "rollback"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.action == "rollback":
            check_rollback_support(trainer, pl_module)
        for rule in self._listener.rules:
            rule.setup(trainer, pl_module)
        self._snapshots.window.folder = self.folder or trainer.default_root_dir
        _move_last(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.action == "rollback":
            check_optimizers(trainer)
            self._rates.attach(trainer.optimizers)
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

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.action == "rollback" and not self._snapshots.steps:
            self._take(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._listener.add_loss(outputs)
        if trainer.global_step == self._step:
            return  # no optimizer has stepped
        self._step = step = trainer.global_step
        alarms = self._listener.after_step(trainer, pl_module, _is_last_step(trainer), self.action == "warn")
        if self._in_a_row and self.forget_after is not None and step >= self._last_alarm + self.forget_after:
            self._in_a_row, self._last_alarm, self._last_restored = 0, -1, -1
        if alarms:
            self._act(trainer, alarms)
        elif self.action == "rollback" and step >= self._due:
            self._take(trainer)
        if self._rates_until is not None and self._step >= self._rates_until:
            self._rates.factor, self._rates_until = 1.0, None
        if trainer._logger_connector.should_update_logs:
            self._log(pl_module)

    def _act(self, trainer: Trainer, alarms: list[Alarm]) -> None:
        self.alarms += len(alarms)
        if self.action == "warn":
            for alarm in alarms:
                self._warn(alarm, self._step)
        elif self.action == "rollback":
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
            self._check_memory(trainer, tensor_bytes(state))
        self._snapshots.take(self._step, state)
        self._due = (self._step // self.every_n_steps + 1) * self.every_n_steps

    def _check_memory(self, trainer: Trainer, size: int) -> None:
        """Say what the snapshots take, and refuse what does not fit, on all ranks together."""
        window = self._snapshots.window
        sharing = 1 if window.place == "model" else max(1, trainer.num_devices)  # ranks of this machine
        free = window.free_bytes(trainer.strategy.root_device)
        where = {"cpu": "host memory", "disk": f"files under {window.folder}", "model": "the model's device"}
        needed = f"{window.length} x {readable_size(size)} on each rank in {where[window.place]}"
        fits = free is None or (window.length - len(self._snapshots.steps)) * size * sharing <= free
        if not trainer.strategy.reduce_boolean_decision(fits, all=True):
            raise MisconfigurationException(
                f"TrainingGuard(keep={window.length}) keeps {needed}, and {readable_size(free or 0)} are free here: "
                "take a smaller keep= or another device= ('cpu', 'disk', 'model')"
            )
        rank_zero_info(f"TrainingGuard keeps {needed}")

    def _roll_back(self, trainer: Trainer, alarm: Alarm) -> None:
        limit = alarm.step - self.margin
        if alarm.step <= self._last_alarm:  # what was restored the last time has not helped
            limit = min(limit, self._last_restored - 1)
        old = [step for step in self._snapshots.steps if step <= limit]
        target = old[-1] if old else self._snapshots.steps[0]
        if target >= alarm.step:
            raise TrainingDivergedError(
                f"{_words(alarm)}, and TrainingGuard has no snapshot from before it, the oldest is of step {target}: "
                "a larger keep= or every_n_steps= reaches further back"
            )
        now, given_up = self._step, self._in_a_row >= self.max_rollbacks
        snapshot = self._snapshots.read(target)
        restore(trainer, snapshot)
        self._snapshots.drop_after(target)
        self._step = target
        self._due = (target // self.every_n_steps + 1) * self.every_n_steps
        if given_up:
            path = self._save(trainer)
            raise TrainingDivergedError(
                f"{_words(alarm)}, after {self._in_a_row} rollbacks in a row, and TrainingGuard(max_rollbacks="
                f"{self.max_rollbacks}) gives up. The state of step {target} is restored and saved in {path}: resume "
                "from it with other settings"
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
        trainer.save_checkpoint(path)
        return path

    def _log(self, pl_module: LightningModule) -> None:
        values: dict[str, float] = {"alarms": self.alarms}
        if self.action == "rollback":
            values |= {"rollbacks": self.rollbacks, "undone_steps": self.undone_steps, "lr_factor": self._rates.factor}
        for name, value in values.items():
            pl_module.log(f"training_guard/{name}", float(value), on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._rates.detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._rates.detach()
        self._snapshots.clear()

    def rollback_state(self) -> dict[str, Any]:
        """What goes back with the run: what the rules have seen. The counts of what has happened go on."""
        return self._listener.rollback_state()

    def roll_back(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Take it back."""
        self._listener.roll_back(state)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **self._listener.state_dict(),
            **{name: getattr(self, name) for name in _COUNTS},
            "warned": dict(self._warned),
            "rate_factor": self._rates.factor,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load(state_dict)
        self._resumed = True

    def _load(self, state: dict[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._listener.load_state_dict(state)
        self._warned = dict(state["warned"])
        self._rates.factor = state["rate_factor"]

    def __getstate__(self) -> dict[str, Any]:
        window = self._snapshots.window
        return {**vars(self), "_snapshots": RunSnapshots(window.length, window.place)}

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        if self.action != "rollback":
            return {"alarms": ["Multiline", ["training_guard/alarms"]]}
        return {
            "alarms, rollbacks": ["Multiline", ["training_guard/alarms", "training_guard/rollbacks"]],
            "undone steps": ["Multiline", ["training_guard/undone_steps"]],
            "factor of the learning rate": ["Multiline", ["training_guard/lr_factor"]],
        }


_COUNTS = ("alarms", "rollbacks", "undone_steps", "_in_a_row", "_last_alarm", "_last_restored", "_rates_until")


def _words(alarm: Alarm) -> str:
    return f"{alarm.source} at step {alarm.step}: {alarm.message}"


def _is_last_step(trainer: Trainer) -> bool:
    """Whether no other step follows in which the numbers of this one could be read."""
    loop = trainer.fit_loop
    if loop.max_steps != -1 and trainer.global_step >= loop.max_steps:
        return True
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= loop.max_epochs  # type: ignore[operator]
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


def _move_last(trainer: Trainer, guard: Callback) -> None:
    """Reorder so that what other callbacks do in a hook is done when a snapshot is taken or put back."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [callback for callback in callbacks if callback is not guard]
    savers = [callback for callback in others if isinstance(callback, Checkpoint)]
    # A new list: the Trainer is iterating over the old one.
    trainer.callbacks = [*(c for c in others if c not in savers), guard, *savers]  # type: ignore[attr-defined]
