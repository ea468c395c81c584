"""Preemption as a Lightning callback."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.timer import Timer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_number, check_text
from lightning_eff.callbacks.preemption.emergency import StepWatch, save_alone
from lightning_eff.callbacks.preemption.notices import Notices, signal_numbers
from lightning_eff.callbacks.preemption.vote import Vote
from lightning_eff.callbacks.preemption.workers import Workers
from lightning_eff.training.hooks import Order, WritesLater, tell
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.trainer import callbacks_of, replicas_are_equal, save_surely, sort_callbacks
from lightning_eff.training.wrapping import Wrapper

Requeue = Literal["auto", "never"]

FILE = "last-preemption.ckpt"  # `ckpt_path="last"` looks for what begins so
EMERGENCY_FILE = "last-emergency.ckpt"


class Preempted(SystemExit):
    """Ends the process with ``exit_code`` once the state is saved; Lightning tears the Trainer down on its way."""


class Preemption(Callback):
    """Ends a run between two steps when it has to end, with its state saved, on all ranks together.

    A run has to end on a signal (a spot instance, Slurm, Kubernetes), when a file appears, when a notice says so, or
    before the queue's time limit. Nothing is done in the signal's handler but a note. The ranks agree on the step at
    which to stop; there one checkpoint is saved, and the process ends with ``exit_code``. A validation that is due or
    in progress is not waited for: the resumed run begins with it, in full. A second signal, more than a second behind
    the first, ends the process at once.

    The checkpoint is ``last-preemption.ckpt`` in the folder of the Trainer's checkpoints, which
    ``fit(ckpt_path="last")`` finds; under Slurm it is Lightning's ``hpc_ckpt_<n>.ckpt``, which a requeued job finds by
    itself. Weights, optimizers, callbacks and loops are in it as in any checkpoint; for the order of samples and random
    numbers add ``ExactResume``.

    In place of Lightning's own handling of SIGTERM, which broadcasts a tensor and waits for the device in every batch,
    hangs where one rank alone gets the signal, and saves within the handler under Slurm. Both are switched off while
    this callback is there.

    Runs in: ``on_sanity_check_start``, ``on_train_start``, and behind all hooks of each batch.
    Reads: nothing of the training.
    Changes: nothing, until it ends the run.
    Collectives: an all-reduce of 24 bytes every ``every_n_steps`` batches, on a gloo group of its own; saving.
    Host syncs: none.
    Strategies: all; under ``ddp_ft`` a replica leaves the others, who go on, and saves only if all leave at once.

    Args:
        signals: names of signals that end the run; None for ``["SIGTERM"]``.
        file: its existence ends the run; None for none.
        notice: asked every ``poll_seconds`` in a thread; returns why the run has to end, in words, or None. For a
            cloud's metadata service, say.
        max_time: the run ends when it has taken so long since training began, as Lightning's
            ``Trainer(max_time=...)``: "DD:HH:MM:SS". Leave time for saving.
        every_n_steps: batches, of training or validation, between two all-reduces, >= 1. A notice is acted on after at
            most twice as many by all, at once by one rank alone, and one later where that is an epoch's last.
        exit_code: of the process, in [0, 255]. 143 is what a process has that SIGTERM ended; torchrun and Kubernetes
            take all but 0 for a failure. None ends no process: the state is saved, and ``fit`` returns, after a
            validation if one is due. Not under ``ddp_ft``, where the others would wait for it.
        requeue: ``"auto"``: in a job of Slurm rank zero calls ``scontrol requeue``. ``"never"`` leaves it.
        emergency: when a rank fails by an exception, it saves ``last-emergency.ckpt``, the state before the step in
            flight, without asking the others, who may stand in a collective. One device and DDP. An exception within
            an optimizer's update saves nothing. ``ModelCheckpoint(save_on_exception=True)`` then saves nothing.
        poll_seconds: how often the file is looked for and the notice asked, > 0.
        timeout: seconds after which a rank that does not answer ends the others with an error, > 0.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for two of these callbacks, for ``emergency`` with a strategy whose
            state no rank has alone, and for ``exit_code=None`` under ``ddp_ft``.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import Preemption
        >>> trainer = L.Trainer(max_steps=1, callbacks=[Preemption(signals=["SIGTERM", "SIGUSR1"])], logger=False)

    Source: ours.
    """

    order = Order.LAST

    def __init__(
        self,
        signals: list[str] | None = None,
        file: str | None = None,
        notice: Callable[[], str | None] | None = None,
        max_time: str | None = None,
        every_n_steps: int = 10,
        exit_code: int | None = 143,
        requeue: Requeue = "auto",
        emergency: bool = False,
        poll_seconds: float = 5.0,
        timeout: float = 300.0,
    ) -> None:
        numbers = signal_numbers(signals)
        check_text("file", file, optional=True)
        check("notice", notice, notice is None or callable(notice), "a function without arguments, or None")
        check_count("every_n_steps", every_n_steps)
        check_count("exit_code", exit_code, least=0, most=255, optional=True)
        check_choice("requeue", requeue, Requeue)
        check_flag("emergency", emergency)
        check_number("poll_seconds", poll_seconds, above=0)
        check_number("timeout", timeout, above=0)
        self.signals = [number.name for number in numbers]
        self.max_time = max_time
        self.exit_code = exit_code
        self.requeue: Requeue = requeue
        self.emergency = emergency
        self.saved: str | None = None
        """Path of the checkpoint with which the run has ended."""
        self._notices = Notices(numbers, file, notice, poll_seconds, _seconds(max_time))
        self._vote = Vote(every_n_steps, timeout)
        self._watch = StepWatch()
        self._workers = Workers(numbers)
        self._loops: list[Wrapper] = []  # where loaders are made
        self._wrappers: list[Wrapper] = []
        self._savers: list[Wrapper] = []  # of what comes behind this callback's own `on_exception`
        self._reason: str | None = None  # agreed on
        self._ended = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(callback, Preemption) for callback in callbacks_of(trainer)) > 1:
            raise MisconfigurationException("two Preemption callbacks would both end the run: keep one")
        alone = is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy)
        if self.emergency and (not alone or is_a(trainer.strategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                f"Preemption(emergency=True) does not support {type(trainer.strategy).__name__}, under which no rank "
                "has the whole state: set emergency=False"
            )
        if self.exit_code is None and replicas_are_equal(trainer.strategy):
            raise MisconfigurationException(
                "Preemption(exit_code=None) lets `fit` return, and under ddp_ft the other replicas would wait for this "
                "one: a replica leaves them by ending its process. Give an exit_code"
            )
        sort_callbacks(trainer)
        self._detach()
        self._reason, self.saved, self._ended = None, None, False
        self._vote.attach()
        fit, validation = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
        # Each comes between the making of the loaders and their first iteration.
        self._loops = [
            Wrapper(loop, name, lambda inner, loop=loop: self._follow(loop, inner))
            for loop, name in ((fit, "_load_combined_loader_states"), (validation, "reset"))
        ]

    def _follow(self, loop: Any, inner: Callable[[], None]) -> None:
        self._workers.follow(loop._combined_loader)
        inner()

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)  # of two hooks, since there may be no sanity check
        if self.emergency:
            self._watch.attach()

    def _begin(self, trainer: Trainer) -> None:
        if not self._wrappers:
            self._notices.begin()
            loop = trainer.fit_loop.epoch_loop
            self._wrappers = [
                Wrapper(loop, "on_advance_end", lambda inner, fetcher: self._after_batch(trainer, inner, fetcher)),
                # A broadcast and a host sync in every batch, for what is done here.
                Wrapper(loop, "_broadcast_sigterm_tensor", lambda inner: None),
            ]
            savers = [callback for callback in callbacks_of(trainer) if is_a(callback, ModelCheckpoint)]
            self._savers = [Wrapper(callback, "on_exception", self._on_exception_of_checkpoint) for callback in savers]
        self._notices.handle_signals()  # Lightning has set its own behind `setup` and `on_fit_start`

    def _on_exception_of_checkpoint(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """One file and not two; and its barrier would wait for ranks that stand elsewhere."""
        saver: Any = inner
        for wrapper in self._savers:  # Lightning calls no `teardown` behind an exception
            if wrapper.target is saver.__self__:
                wrapper.remove()
        if not (self._ended or self.emergency):
            inner(*args, **kwargs)

    # --- the step at which to stop ----------------------------------------------------------------------------------

    def _after_batch(self, trainer: Trainer, inner: Callable[..., Any], fetcher: Any) -> None:
        """Behind all hooks of a batch, before the validation that may be due."""
        loop = trainer.fit_loop.epoch_loop
        if replicas_are_equal(trainer.strategy):
            self._take_leave(trainer)
            inner(fetcher)
        elif self._ended or not self._agreed(trainer) or loop._should_accumulate():
            inner(fetcher)
        elif loop._should_check_val_fx(fetcher):
            self._leave(trainer, validation_pending=True)
            inner(fetcher)  # without an exit code
        else:
            inner(fetcher)
            # Behind an epoch's last batch Lightning would resume with one too many: then behind the next one's first.
            if not loop.batch_progress.is_last_batch:
                self._leave(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._wrappers and replicas_are_equal(trainer.strategy):
            self._take_leave(trainer)
        elif self._wrappers and not self._ended and self._agreed(trainer):
            if trainer.sanity_checking:
                self._end(trainer, "the state is that of the start, and nothing is saved")
            else:
                self._leave(trainer, validation_pending=True)

    def _agreed(self, trainer: Trainer) -> bool:
        if self._reason is not None:
            return True
        reason = self._notices.reason
        if self._vote.tick(reason is not None):
            self._reason = reason or "a notice on another rank"
        return self._reason is not None

    def _take_leave(self, trainer: Trainer) -> None:
        """Of the other replicas, which have the state: some steps later the strategy ends this process."""
        if not self._ended and self._agreed(trainer):
            self._ended = True
            rank_zero_info(f"Preemption: this replica leaves because of {self._reason}; the others go on")
            trainer.strategy.leave(self.exit_code)  # type: ignore[attr-defined]

    def on_all_leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save: no replica goes on."""
        self._reason = self._reason or "a notice"
        self._announce(trainer, self._save(trainer))

    def _leave(self, trainer: Trainer, validation_pending: bool = False) -> None:
        """Save, and end the process, or without an exit code the fit."""
        self._end(trainer, self._save(trainer, validation_pending))

    def _save(self, trainer: Trainer, validation_pending: bool = False) -> str:
        """What was done, in words."""
        began = time.monotonic()
        self.saved = path = self._path(trainer, FILE)
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        before = progress.state_dict()
        try:
            if validation_pending:  # Lightning takes it for broken off in its first batch, and begins anew
                begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
                progress.load_state_dict({**before, "total": begun, "current": begun})
            save_surely(trainer, path)
            tell(trainer, WritesLater)
        finally:
            progress.load_state_dict(before)
        return f"its state is saved in {path}, in {time.monotonic() - began:.1f} s"

    def _end(self, trainer: Trainer, what: str) -> None:
        self._announce(trainer, what)
        if self.exit_code is not None:
            raise Preempted(self.exit_code)
        trainer.should_stop = True  # only now: Lightning validates before it stops, and what is saved knows of no such

    def _announce(self, trainer: Trainer, what: str) -> None:
        rank_zero_info(f"Preemption: the run ends at step {trainer.global_step} because of {self._reason}; {what}")
        self._ended = True
        if trainer.is_global_zero and self.requeue == "auto" and (job := _slurm_job()) is not None:
            _requeue(job)

    def _path(self, trainer: Trainer, file: str) -> str:
        if file == FILE and _slurm_job() is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path: str = trainer.strategy.broadcast(_CheckpointConnector.hpc_save_path(trainer.default_root_dir))
            return path
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        return os.path.join(folder, file)

    # --- emergencies, and the end -----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.within = False

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._watch.before_update()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        failed = isinstance(exception, Exception) and self._wrappers and not self._ended
        if failed and self.saved is None and self._notices.reason is not None:
            rank_zero_warn(
                f"Preemption: {type(exception).__name__} came before the step at which this run was to end because of "
                f"{self._notices.reason}"
            )
        if self.emergency and failed and not trainer.sanity_checking:
            if self._watch.within:
                rank_zero_warn("Preemption(emergency=True) saves nothing: weights are in the midst of an update")
            else:
                path = self._path(trainer, EMERGENCY_FILE)
                save_alone(trainer, path)
                self.saved = path
                rank_zero_warn(f"Preemption: {type(exception).__name__}; the state before this step is saved in {path}")
        savers, self._savers = self._savers, []
        self._detach()
        self._savers = savers

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for wrapper in (*self._loops, *self._wrappers, *self._savers):
            wrapper.remove()
        self._loops, self._wrappers, self._savers = [], [], []
        self._workers.detach()
        self._watch.detach()
        self._notices.end()
        self._vote.detach()

    def __getstate__(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"_loops": [], "_wrappers": [], "_savers": []}
        return {**vars(self), **nothing, "_watch": StepWatch(), "_workers": Workers(self._workers.signals)}


def _seconds(max_time: Any) -> float | None:
    """Lightning's own reading of a time."""
    try:
        duration = Timer(max_time)._duration if isinstance(max_time, str | timedelta) else None
    except Exception:
        duration = None
    check("max_time", max_time, max_time is None or bool(duration), 'a time "DD:HH:MM:SS" above 0, or None')
    return duration


def _slurm_job() -> str | None:
    """As ``scontrol`` wants it; None outside of a job."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return os.environ.get("SLURM_JOB_ID")


def _requeue(job: str) -> None:
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        rank_zero_warn(f"Preemption could not requeue job {job}: {error}")
        return
    if done.returncode != 0:
        rank_zero_warn(f"Preemption could not requeue job {job}: {done.stderr.strip() or done.returncode}")
