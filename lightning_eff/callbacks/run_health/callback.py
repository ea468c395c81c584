"""RunHealth as a Lightning callback."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check_choice, check_count, check_flag, check_number, check_text
from lightning_eff.callbacks.run_health.collector import Collector
from lightning_eff.callbacks.run_health.connections import Connections
from lightning_eff.callbacks.run_health.dashboard import charts, numbers
from lightning_eff.callbacks.run_health.device_times import DeviceTimes
from lightning_eff.callbacks.run_health.exchange import Exchange, Numbers
from lightning_eff.callbacks.run_health.limits import Limits
from lightning_eff.callbacks.run_health.phases import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    OTHER,
    PHASES,
    SAVING,
    VALIDATION,
    WAITING,
    Phases,
)
from lightning_eff.callbacks.run_health.stragglers import Finding, Stragglers, Window, quantiles, summary
from lightning_eff.callbacks.run_health.verdict import Verdict
from lightning_eff.callbacks.run_health.watchdog import Watchdog
from lightning_eff.callbacks.run_health.weights_hash import WeightsHash, differing, first_difference
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.alarms import Alarm, sound
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.hooks import Order
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.trainer import callbacks_of, log_values, logs_now, replicas_are_equal, sort_callbacks

Action = Literal["warn", "abort"]

_LATE = 2  # steps from the end of a window until it is read


class RunHealth(Callback):
    """Says which rank is slow and in what, which one holds up a run that hangs, and whose weights differ.

    **Phases.** Every moment of a step belongs to a phase: data, transfer, forward, backward, waiting for the other
    ranks, optimizer, each callback by name, logging, validation, saving. Medians and 99th percentiles are exchanged by
    one all-gather that nobody waits for. A rank that is busier than the others by ``slow`` of a step is named with its
    host and phase; where no rank is and all wait longer than they used to, it is the network. The time in which other
    work has its core, as Linux tells it, counts where that lasts.

    **Watchdog.** A thread, connected to those of the other ranks by sockets of its own. When the main thread has given
    no sign of life for longer than the run so far makes plausible, all ranks write their stacks to ``folder``, and the
    one that the others wait for is named, with where it stands: the rank that has not entered a collective, or that
    does not answer because it was stopped.

    **Equal weights.** The replicas' weights are compared bit by bit; the rank and the first parameter that differs are
    named, and an alarm is sounded, for ``TrainingGuard``.

    **Garbage collection**, on request, on all ranks in the same step.

    Runs in: ``setup``, batch start and end, around the backward pass; in front of the Trainer's profiler, which says
        when each hook begins and ends.
    Reads: clocks; every ``weights_every_n_steps`` the weights.
    Changes: nothing.
    Collectives: one all-gather of 288 bytes every ``every_n_steps`` steps on a gloo group of its own, read two steps
        later, on CUDA when the next is due; two of addresses in ``setup``; one of the weights' sums when they differ.
    Host syncs: none; on CUDA the device's times are read when it has long passed them.
    Strategies: all. Under FSDP2 waiting is within forward and backward, so that a rank which is slow in these is not
        told from those that wait, and shards are not compared. Under ``ddp_ft`` a replica looks after itself.

    Args:
        every_n_steps: optimizer steps of one window, >= 1: what is exchanged and judged together.
        slow: share of a step by which a rank, or the network, has to be slower than the others, or than it was, > 0.
            None judges nobody.
        patience: windows in a row, >= 1, over which it has to be.
        hang_seconds: the least time without a sign of life that is taken for a hang, > 0. None for no watchdog.
        hang_factor: and so many times the median step, batch of validation, save or start of an epoch, > 1.
        first_seconds: in place of both until there have been a few, > 0: the first step may compile.
        action: ``"warn"`` says who hangs, ``"abort"`` then ends the process on every rank that is not stopped, so that
            torchrun or ``lightning-eff launch`` starts it again. Under ``ddp_ft`` only a replica that hangs itself
            ends, and so leaves the quorum; one that waits for others is left to the strategy's own limits.
        exit_code: of ``"abort"``, in [1, 255].
        folder: for the stacks; None for ``run_health`` in the Trainer's ``default_root_dir``.
        weights_every_n_steps: optimizer steps between two comparisons of weights, at the end of a window, >= 1. None
            for none.
        gc_every_n_steps: optimizer steps between two garbage collections, in place of Python's own, >= 1. None leaves
            Python's.
        log_details: also log every phase and, of this rank, every callback.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for two of these callbacks.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import RunHealth
        >>> trainer = L.Trainer(max_steps=1, callbacks=[RunHealth(action="abort")], logger=False)

    Source: ours.
    """

    order = Order.FIRST

    def __init__(
        self,
        every_n_steps: int = 10,
        slow: float | None = 0.1,
        patience: int = 3,
        hang_seconds: float | None = 30.0,
        hang_factor: float = 12.0,
        first_seconds: float = 600.0,
        action: Action = "warn",
        exit_code: int = 75,
        folder: str | None = None,
        weights_every_n_steps: int | None = 990,
        gc_every_n_steps: int | None = None,
        log_details: bool = False,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        check_number("slow", slow, above=0, optional=True)
        check_count("patience", patience)
        check_number("hang_seconds", hang_seconds, above=0, optional=True)
        check_number("hang_factor", hang_factor, above=1)
        check_number("first_seconds", first_seconds, above=0)
        check_choice("action", action, Action)
        check_count("exit_code", exit_code, most=255)
        check_text("folder", folder, optional=True)
        check_count("weights_every_n_steps", weights_every_n_steps, optional=True)
        check_count("gc_every_n_steps", gc_every_n_steps, optional=True)
        check_flag("log_details", log_details)
        self.every_n_steps = every_n_steps
        self.slow = slow
        self.patience = patience
        self.hang_seconds = hang_seconds
        self.hang_factor = hang_factor
        self.first_seconds = first_seconds
        self.action: Action = action
        self.exit_code = exit_code
        self.folder = folder
        self.weights_every_n_steps = weights_every_n_steps
        self.gc_every_n_steps = gc_every_n_steps
        self.log_details = log_details
        self.findings: list[tuple[int, Finding]] = []
        """``global_step`` and what was found to be slow, the same on all ranks."""
        self.differences: list[tuple[int, int, str]] = []
        """``global_step``, rank and parameter of weights that were found to differ."""
        self._phases = Phases()
        self._exchange = Exchange()
        self._collector = Collector(gc_every_n_steps)
        self._connections: Connections | None = None
        self._watchdog: Watchdog | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        self._limits = Limits(self.hang_seconds or 1.0, self.hang_factor, self.first_seconds)
        self._judge = Stragglers(self.slow or 0.1, self.patience)
        self._steps: deque[list[float]] = deque(maxlen=self.every_n_steps)
        self._delays: deque[float] = deque(maxlen=self.every_n_steps)  # of these steps
        self._count = 0  # of steps in this fit
        self._first_step = 0  # the ``global_step`` at its start
        self._stepped = False  # whether the batch before this one has ended a step
        self._device: DeviceTimes | None = None
        self._hash: WeightsHash | None = None
        self._last_hash = 0
        self._window: Window | None = None
        self._slow_now: tuple[int | None] | None = None
        self._weights_differ = False
        self._epoch_ended: float | None = None
        self._batch_ended = time.perf_counter()  # of validation

    @property
    def verdicts(self) -> list[Verdict]:
        """What the watchdog has found so far, on this rank."""
        return [] if self._watchdog is None else self._watchdog.verdicts

    def times(self) -> dict[str, tuple[float, float]]:
        """Median and 99th percentile, in seconds a step, of each phase and each callback of this rank, as of late."""
        names = [*PHASES, *(f"callbacks/{name}" for name in self._phases.names[len(PHASES) :])]
        # A step knows the callbacks that had been called by then.
        return {
            name: quantiles([step[place] for step in self._steps if place < len(step)])
            for place, name in enumerate(names)
        }

    # --- the run ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(callback, RunHealth) for callback in callbacks_of(trainer)) > 1:
            raise MisconfigurationException("two RunHealth callbacks would watch the same run: keep one")
        sort_callbacks(trainer)
        self._detach("begins anew")
        self._begin_run()
        self._exchange.attach()
        group = self._exchange.group
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._connections = Connections(rank, ranks, group)
        self._phases.attach(trainer)
        if self.hang_seconds is not None:
            folder = Path(self.folder or Path(trainer.default_root_dir, "run_health"))
            abort = self.exit_code if self.action == "abort" else None
            replicas = replicas_are_equal(trainer.strategy)
            self._watchdog = Watchdog(self._phases, self._connections, self._limits, folder, abort, replicas)
            self._watchdog.start()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collector.attach()
        self._phases.listen_to(pl_module)
        self._first_step = trainer.global_step
        if trainer.strategy.root_device.type == "cuda":
            self._device = DeviceTimes(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._phases.on_gradients = lambda: self._mark(WAITING)
        if self.weights_every_n_steps is not None and self._exchange.group is not None:
            reshard(pl_module)  # else FSDP2 may show gathered weights, whose memory goes
            self._hash = WeightsHash(clean_named_parameters(pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._stepped:
            self._end_step(trainer)
        elif self._count == 0:
            self._phases.take()  # what was before the first batch is no step
        if self._epoch_ended is not None:
            self._limits.note("epoch", now - self._epoch_ended)
            self._epoch_ended = None
        self._stepped = False
        step = self._first_step + self._count if pl_module.automatic_optimization else trainer.global_step
        self._phases.step_begins(step)
        if self._watchdog is not None:
            self._watchdog.step, self._watchdog.kind = step, "step"
        self._mark(FORWARD)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._phases.backward_begins(loss)
        self._mark(BACKWARD)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phases.backward_has_ended()
        # Of several backward passes in a step by hand, what lies between two is taken for forward.
        self._mark(OPTIMIZER if pl_module.automatic_optimization else FORWARD)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._mark(OTHER)
        self._stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        if self._stepped:
            self._collector.step(self._count + 1)
        if self._window is not None and logs_now(trainer):
            log_values(pl_module, "run_health", numbers(self._window, self.times() if self.log_details else {}))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_ended = time.perf_counter()
        if self._watchdog is not None:
            self._watchdog.kind = "epoch"

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watchdog is not None:
            self._watchdog.kind = "start"  # what comes now, an export say, may take as long as the start

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._batch_ended = time.perf_counter()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._limits.note("validation", time.perf_counter() - self._batch_ended)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(f"{type(exception).__name__}: {exception}", isinstance(exception, Exception))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach("it has come to its end")

    def _detach(self, why: str, failed: bool = False) -> None:
        self._collector.detach()
        self._phases.detach()
        self._phases.on_gradients = None
        if self._watchdog is not None:
            self._watchdog.end(why, failed)
        if self._connections is not None:
            self._connections.close()
            self._connections = None
        self._exchange.detach()

    def _mark(self, phase: int) -> None:
        if self._device is not None:
            self._device.mark(phase)

    # --- windows ----------------------------------------------------------------------------------------------------

    def _end_step(self, trainer: Trainer) -> None:
        delayed, times = self._phases.delayed, self._phases.take()
        self._count += 1
        if times[SAVING]:
            self._limits.note("save", times[SAVING])
        if self._epoch_ended is None:
            self._limits.note("step", sum(times[: len(PHASES)]) - times[SAVING] - times[VALIDATION])
        if self._device is None:
            self._steps.append(times)
            # It may lie in these, which are no part of what a rank is busy with.
            self._delays.append(0.0 if times[SAVING] or times[VALIDATION] else delayed)
        else:
            self._device.close(times)
            self._steps.extend(self._device.ready())
        # A host that runs ahead of its device would wait for one that does less.
        late = min(_LATE, self.every_n_steps - 1) if self._device is None else 0
        if self._count % self.every_n_steps == late:
            self._read_window(trainer)
        if self._count % self.every_n_steps == 0:
            self._send_window(trainer)

    def _send_window(self, trainer: Trainer) -> None:
        halves = [torch.nan, torch.nan] if self._hash is None else self._hash.halves()
        worst = self._worst_callback(trainer)
        self._exchange.send(summary(self._steps, self.every_n_steps, self._delays, worst, halves))
        first = self._count == self.every_n_steps
        if self._hash is not None and (first or self._count - self._last_hash >= (self.weights_every_n_steps or 0)):
            self._hash.take()
            self._last_hash = self._count

    def _read_window(self, trainer: Trainer) -> None:
        told = self._exchange.read()
        if told is None:
            return
        self._window = window = Window.of(told, self.every_n_steps)
        if self.slow is not None:
            self._tell(trainer, self._judge.judge(window))
            self._phases.ask_delay = self._judge.suspects > 0
        self._compare(trainer, window.extra)

    def _worst_callback(self, trainer: Trainer) -> int:
        """Its index among the Trainer's, where the ranks have the same; -1 for none."""
        if not self._steps:
            return -1
        costs = [quantiles(column)[0] for column in zip(*(step[len(PHASES) :] for step in self._steps), strict=False)]
        worst = self._phases.names[len(PHASES) + costs.index(max(costs))] if costs else ""
        names = [type(callback).__name__ for callback in callbacks_of(trainer)]
        return names.index(worst) if worst in names else -1

    def _tell(self, trainer: Trainer, finding: Finding | None) -> None:
        now = None if finding is None else (finding.rank,)  # its phase may change from window to window
        if finding is not None and now != self._slow_now:
            self.findings.append((trainer.global_step, finding))
            rank_zero_warn(f"RunHealth: {self._sentence(trainer, finding)}")
        self._slow_now = now

    def _sentence(self, trainer: Trainer, finding: Finding) -> str:
        share = f"{100 * finding.slower:.0f} % of a step"
        if finding.rank is None:
            return f"no rank is slower than the others, and all wait longer than they used to, by {share}: the network"
        host = self._connections.peers[finding.rank].host if self._connections is not None else "?"
        callbacks, what = callbacks_of(trainer), finding.phase
        if finding.callback is not None and 0 <= finding.callback < len(callbacks):
            what = f"callbacks, mostly {type(callbacks[finding.callback]).__name__}"
        why = " by what other work has of its cores" if finding.crowded else ""
        return f"rank {finding.rank} (host {host}) is slower than the others by {share}{why}, most of it in {what}"

    def _compare(self, trainer: Trainer, halves: Numbers) -> None:
        ranks = differing(halves)
        if ranks and not self._weights_differ and self._hash is not None:
            mine = self._hash.each()
            gathered = [torch.empty_like(mine) for _ in range(len(halves))]
            dist.all_gather(gathered, mine, group=self._exchange.group)
            other = next(rank for rank in range(len(halves)) if rank not in ranks)
            name = first_difference(self._hash.names, torch.stack(gathered), ranks[0], other)
            self.differences += [(trainer.global_step, rank, name) for rank in ranks[:1]]
            who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
            message = f"the weights of {who} differ from those of rank {other}, first in {name}"
            if not sound(trainer, Alarm("run_health", trainer.global_step, message)):
                rank_zero_warn(f"RunHealth: {message}")
        self._weights_differ = bool(ranks)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        return charts(self.log_details)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_phases": Phases(), "_exchange": Exchange(), "_connections": None, "_watchdog": None}
        return {**vars(self), **fresh, "_device": None, "_hash": None}
