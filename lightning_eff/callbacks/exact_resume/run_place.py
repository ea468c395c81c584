"""Where in Lightning's loops a run stands when a checkpoint is saved, and how the one that resumes stands there too.

Lightning's loops guess from their counters how far the epoch had come, and leave out what was still to be done of it: a
validation that was due, the end of an epoch. Here the place is known, and the loops go on from it as if they had come
there by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.loops.loop import _Loop

from lightning_eff.callbacks.exact_resume.generators import GeneratorsOfRun
from lightning_eff.callbacks.exact_resume.worker import RawState, raw_random_state, readable
from lightning_eff.training.random_state import random_state
from lightning_eff.training.wrapping import Wrapper

Stage = Literal["outside", "epoch_start", "batch", "batch_end", "validation", "validated", "epoch_end"]
"""Between two epochs; in the hooks of its start; before a batch or within one; behind one; in the validation behind it;
behind that; in the hooks of the epoch's end."""

BETWEEN_EPOCHS = ("outside", "epoch_start", "epoch_end")


@dataclass
class _Moment:
    """What was so before a batch, or before a validation."""

    random: RawState
    cuda: Any
    epoch_begins: bool | None
    hook: str | None
    last: bool
    steps: int
    generators: dict[str, Any]

    def random_state(self) -> dict[str, Any]:
        return {**readable(self.random), **({} if self.cuda is None else {"cuda": self.cuda})}


class RunPlace:
    """Follows the loops of a fit."""

    def __init__(self) -> None:
        self.stage: Stage = "outside"
        self.within_batch = False
        """A batch has been asked for and is not behind: it is to be done again."""
        self.ahead = False
        """The first epoch's loaders have been asked for iterators, and the epoch has not begun."""
        self._moment: _Moment | None = None
        self._validated: dict[str, Any] = {}
        """Progress of the validations before the one that runs."""
        self._saved: dict[str, Any] | None = None
        self._accumulated = 1
        """Batches for a step, as the Trainer was told; a schedule of a callback sets others while it trains."""
        self._wrappers: list[Wrapper] = []
        self._generators: Any = None

    def attach(
        self,
        trainer: Trainer,
        generators: GeneratorsOfRun,
        set_loaders: Callable[[], None],
        begin: Callable[[], None],
        begin_batch: Callable[[], None],
        begin_epoch: Callable[[Any], None],
    ) -> None:
        """Stand in front of the loops' methods until `detach`.

        Args:
            trainer: in ``setup``.
            generators: that are somebody's own.
            set_loaders: called when the training loaders are there and have not been iterated.
            begin: called when the loops are about to go on, behind ``on_train_start``.
            begin_batch: called when a training batch is about to be asked for.
            begin_epoch: called with the fetcher when a resumed run's first epoch goes on, if there is one.
        """
        self.detach()
        self._generators = generators
        self.stage, self.within_batch, self.ahead = "outside", False, False
        self._accumulated = trainer.accumulate_grad_batches
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop

        def loaders(inner: Callable[[], None]) -> None:
            inner()
            # In an epoch that is not the first, Lightning asks once more.
            self.ahead = self.stage in BETWEEN_EPOCHS and trainer.current_epoch == 0
            set_loaders()

        def loaders_set_up(inner: Callable[[], None]) -> None:
            inner()
            if self.stage == "epoch_start":  # they may have been made anew, which is not done again
                self._moment = self._now(trainer)

        def fit_start(inner: Callable[[], None]) -> None:
            inner()
            generators.find()
            begin()
            self._go_on_accumulating(trainer)
            if self._saved is not None and self._saved["stage"] == "epoch_end":
                self._end_epoch(trainer)

        def epoch_hooks(inner: Callable[[], None]) -> None:
            generators.find()
            self._moment, self.stage = self._now(trainer), "epoch_start"
            inner()

        def epoch_start(inner: Callable[[Any], None], fetcher: Any) -> None:
            inner(fetcher)
            self.ahead = False
            begin_epoch(fetcher)
            saved, self._saved = self._saved, None
            self.stage = "batch"
            if saved is not None and saved["stage"] in ("batch_end", "validation", "validated"):
                self.stage = saved["stage"]
                if self.stage == "batch_end":  # what Lightning does of the batch behind its hooks
                    trainer._logger_connector.on_batch_end()
                    trainer._logger_connector.update_train_step_metrics()
                epoch._skip_next_val = self.stage == "validated"
                epoch.on_advance_end(fetcher)

        def batch(inner: Callable[[Any], None], fetcher: Any) -> None:
            self._moment, self.stage, self.within_batch = self._now(trainer), "batch", True
            begin_batch()
            inner(fetcher)
            self.end_batch()

        def batch_end(inner: Callable[[Any], None], fetcher: Any) -> None:
            inner(fetcher)
            self.stage = "batch"

        def validation(inner: Callable[[], Any]) -> Any:
            if trainer.sanity_checking:
                return inner()
            generators.find()
            self._moment, self.stage = self._now(trainer), "validation"
            self._validated = epoch.val_loop.batch_progress.state_dict()
            outputs = inner()
            self.stage = "validated"
            return outputs

        def epoch_end(inner: Callable[[], None]) -> None:
            self.stage = "epoch_end"
            inner()
            self.stage = "outside"

        self._wrappers = [
            Wrapper(fit, "_load_combined_loader_states", loaders),
            Wrapper(fit, "setup_data", loaders_set_up),
            Wrapper(fit, "reset", lambda inner: self._reset_fit(trainer, inner)),
            Wrapper(fit, "on_run_start", fit_start),
            Wrapper(fit, "on_advance_start", epoch_hooks),
            Wrapper(fit, "on_advance_end", epoch_end),
            Wrapper(epoch, "reset", lambda inner: self._reset_epoch(trainer, inner)),
            Wrapper(epoch, "on_run_start", epoch_start),
            Wrapper(epoch, "advance", batch),
            Wrapper(epoch, "on_advance_end", batch_end),
            Wrapper(epoch.val_loop, "run", validation),
        ]

    def detach(self) -> None:
        """Leave the loops as they were."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers = []

    def end_batch(self) -> None:
        """The batch in hand is behind."""
        self.stage, self.within_batch = "batch_end", False

    def end_validation(self) -> None:
        """The validation is behind, and its end is told to the callbacks."""
        self.stage = "validated"

    # --- saving ------------------------------------------------------------------------------------------------------

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """The place, for `load`; plain values."""
        loop: Any = trainer.fit_loop.epoch_loop
        moment = self._now(trainer)
        before = self.within_batch or self.stage in ("epoch_start", "validation", "validated")
        if before and self._moment is not None:
            moment = self._moment
        repeated = self.within_batch or self.stage in ("epoch_start", "validation")
        return {
            "stage": self.stage,
            "random": moment.random_state() if repeated else random_state(trainer.strategy.root_device),
            "generators": moment.generators if repeated else self._generators.find().state(),
            "total": loop.batch_progress.total.processed,
            "batches": loop.batch_progress.current.processed,
            "last": moment.last if self.within_batch else loop.batch_progress.is_last_batch,
            "validation": self._validated if self.stage == "validation" else loop.val_loop.batch_progress.state_dict(),
            "steps": moment.steps,
            "epoch_begins": moment.epoch_begins,
            "hook": moment.hook,
            "epochs": trainer.fit_loop.epoch_progress.current.completed,
            "reloaded": trainer.fit_loop._last_train_dl_reload_epoch,
            "accumulated": [self._accumulated, trainer.accumulate_grad_batches],
        }

    def batches(self, trainer: Trainer) -> int | None:
        """How many of the epoch's batches are behind; None between two epochs."""
        if self.stage in BETWEEN_EPOCHS:
            return 0 if self.ahead else None
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)

    def _now(self, trainer: Trainer) -> _Moment:
        device, connector, loop = trainer.strategy.root_device, trainer._logger_connector, trainer.fit_loop.epoch_loop
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return _Moment(
            raw_random_state(),
            cuda,
            connector._first_loop_iter,
            connector._current_fx,
            loop.batch_progress.is_last_batch,
            loop._batches_that_stepped,
            self._generators.state(),
        )

    # --- going on ----------------------------------------------------------------------------------------------------

    def load(self, saved: dict[str, Any] | None) -> None:
        """Go on from a place when the fit begins."""
        self._saved = saved

    def _reset_fit(self, trainer: Trainer, inner: Callable[[], None]) -> None:
        loop, saved = trainer.fit_loop, self._saved
        if saved is None:
            inner()
            return
        # FitLoop's own setter says True to all loops of a run that only its steps end. Behind an epoch's last batch no
        # other puts that right, and each epoch to come would be taken for the one that is over.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        if saved["stage"] == "outside":
            inner()
            return
        torch.set_grad_enabled(True)
        loop._last_train_dl_reload_epoch = saved["reloaded"]
        stages = {"epoch_start": RestartStage.RESTARTED_ON_EPOCH_START, "epoch_end": RestartStage.NONE}
        loop._restart_stage = stages.get(saved["stage"], RestartStage.RESTARTED_MID_EPOCH)

    def _reset_epoch(self, trainer: Trainer, inner: Callable[[], None]) -> None:
        loop, saved = trainer.fit_loop.epoch_loop, self._saved
        if saved is None or saved["stage"] in BETWEEN_EPOCHS:
            inner()
            return
        progress = loop.batch_progress
        for counts, number in ((progress.total, saved["total"]), (progress.current, saved["batches"])):
            counts.load_state_dict(dict.fromkeys(("ready", "started", "processed", "completed"), number))
        progress.is_last_batch = saved["last"]
        steps = loop.automatic_optimization.optim_progress.optimizer
        for counts in (steps.step.total, steps.step.current, steps.zero_grad.total, steps.zero_grad.current):
            counts.reset_on_restart()  # a batch in hand may have asked for what it did not do
        loop.val_loop.batch_progress.load_state_dict(saved["validation"])
        loop._batches_that_stepped = saved["steps"]
        trainer._logger_connector._first_loop_iter = saved["epoch_begins"]
        trainer._logger_connector._current_fx = saved["hook"]

    def _go_on_accumulating(self, trainer: Trainer) -> None:
        """As a callback had set it: in the midst of an epoch Lightning does not tell it that the epoch begins.

        A run that is told another number than the one that was broken off keeps it.
        """
        told, set_since = (self._saved or {}).get("accumulated", (None, None))
        if told == self._accumulated:
            trainer.accumulate_grad_batches = set_since

    def _end_epoch(self, trainer: Trainer) -> None:
        """What was still to be done of the epoch behind its last hooks."""
        assert self._saved is not None
        loop = trainer.fit_loop
        loop.epoch_progress.current.completed = self._saved["epochs"]
        connector = trainer._logger_connector
        connector.epoch_end_reached()
        connector.on_epoch_end()
        if loop.epoch_loop._num_ready_batches_reached():
            loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop.epoch_loop._batches_that_stepped -= 1  # as Lightning counts it for the epoch's means
        connector.update_train_epoch_metrics()
        loop.epoch_loop._batches_that_stepped += 1
        loop.epoch_progress.increment_completed()
