"""Where the time of a step goes: every moment of the main thread belongs to one phase, by Lightning's own marks.

Lightning calls ``trainer.profiler`` around each hook of each callback, the strategy's steps, fetching and saving. Here
these calls are answered by a clock; the user's own profiler, if there is one, is called too. What Lightning does not
mark (logging, waiting for other ranks) is marked by wrapping its methods. No device is synchronised.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.autograd import Variable

from lightning_eff.callbacks.run_health.delay import Delay
from lightning_eff.training.wrapping import Wrapper

PHASES = (
    "data",
    "transfer",
    "forward",
    "backward",
    "waiting",
    "optimizer",
    "callbacks",
    "logging",
    "validation",
    "saving",
    "other",
)
"""Phases of a step. ``callbacks`` is the sum over all of them, each of which has a place of its own behind these."""

(DATA, TRANSFER, FORWARD, BACKWARD, WAITING, OPTIMIZER, CALLBACKS, LOGGING, VALIDATION, SAVING, OTHER) = range(11)

_CALLBACK = re.compile(r"\[Callback\](\w+).*\.(\w+)$", re.DOTALL)  # the key of its state may stand in between
_BY_NAME = (  # of what Lightning marks; the first that is found in a name
    ("dataloader_next", DATA),
    ("batch_to_device", TRANSFER),
    ("batch_transfer", TRANSFER),
    ("transfer_batch", TRANSFER),
    ("training_step", FORWARD),
    (".backward", BACKWARD),
    ("optimizer_step", OPTIMIZER),
    ("optimizer_zero_grad", OPTIMIZER),
    ("gradient_clipping", OPTIMIZER),
    ("lr_scheduler_step", OPTIMIZER),
    ("save_checkpoint", SAVING),
)


class Phases:
    """The clock: which phase the main thread is in, since when, and what each has taken in the step in hand.

    Attributes:
        names: of the phases, and of the callbacks behind them.
        here: index of the phase that the main thread is in.
        since: when it came there, by ``time.perf_counter``: the last sign of life.
        times: seconds of the step in hand, for each of ``names``.
        delayed: seconds of it in which the main thread could have run and no core was free, while it was busy.
        passed: how many phases have begun in it, which tells what comes before what on different ranks.
        open: the phases around it, outermost first.
        validating: whether a validation is under way: how many.
        ask_delay: whether the system is asked for ``delayed``, which is 0 otherwise.
    """

    def __init__(self) -> None:
        self.names = list(PHASES)
        self.here = OTHER
        self.since = time.perf_counter()
        self.times = [0.0] * len(PHASES)
        self.delayed = 0.0
        self.passed = 0
        self._step = -1
        self.on_gradients: Callable[[], None] | None = None  # called behind the last gradient of this rank
        self.cell: Any = bytearray(16)  # where ``here`` is written to as well, see last_place.py
        self.open: list[int] = []
        self._around = OTHER  # the backward pass
        self.ask_delay = False
        self._delay: Delay | None = None
        self._delay_from: float | None = None
        self._parameter: Any = None  # the hook of one
        self._told = False  # whether it was called in the last backward pass
        self._spans = _Spans(self)
        self._wrappers: list[Wrapper] = []
        self._profiler: Any = None  # whose ``profile`` is taken over
        self.validating = 0

    # --- the clock --------------------------------------------------------------------------------------------------

    def turn(self, phase: int) -> None:
        """What is going on belongs to another phase from now on."""
        now = time.perf_counter()
        self.times[self.here] += now - self.since
        self.here, self.since = phase, now
        self.cell[0] = phase
        self.passed += 1

    def step_begins(self, step: int) -> None:
        """For those who look at a process that was stopped, and for what is counted within a step."""
        struct.pack_into("<q", self.cell, 8, step)
        if step != self._step:
            self._step, self.passed = step, 0

    def take(self) -> list[float]:
        """The times since the last call, which begin anew; callbacks are summed up under their phase too."""
        now = time.perf_counter()
        self.times[self.here] += now - self.since
        self.since = now
        times, self.times, self.delayed = self.times, [0.0] * len(self.names), 0.0
        times[CALLBACKS] = sum(times[len(PHASES) :])
        return times

    @property
    def place(self) -> str:
        """In which phase the main thread is, in words; may be asked by any thread."""
        return self.names[self.here]

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being saved; may be asked by any thread."""
        return self.here == SAVING or SAVING in self.open

    # --- what is marked ---------------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer) -> None:
        """Listen to a Trainer, from ``setup`` on."""
        self.detach()
        profiler = trainer.profiler  # type: ignore[attr-defined]
        loop, strategy, logging = trainer.fit_loop.epoch_loop, trainer.strategy, trainer._logger_connector
        if type(profiler) is PassThroughProfiler:  # it does nothing, and this comes dozens of times in a step
            self._profiler = profiler
            vars(profiler)["profile"] = self._spans.__getitem__
        else:
            self._wrappers = [Wrapper(profiler, "profile", self._span_around)]
        self._wrappers += [
            Wrapper(profiler, "start", self._start),
            Wrapper(profiler, "stop", self._stop),
            Wrapper(loop.val_loop, "run", self._validation),
            Wrapper(loop, "_broadcast_sigterm_tensor", self._within(WAITING)),
            Wrapper(loop, "_save_loggers_on_train_batch_end", self._within(LOGGING)),
            Wrapper(logging, "update_train_step_metrics", self._within(LOGGING)),
            *(Wrapper(strategy, name, self._within(WAITING)) for name in ("barrier", "broadcast")),
        ]
        self.open, self.here, self.since = [], OTHER, time.perf_counter()
        self.times = [0.0] * len(self.names)
        self._delay, self._delay_from = Delay(), None

    def listen_to(self, pl_module: LightningModule) -> None:
        """Hear of each backward pass from a parameter: a hook of the loss would have to be made anew in each."""
        parameter = next((each for each in pl_module.parameters() if each.requires_grad), None)
        if parameter is not None:
            hook = self._at_the_parameter
            self._parameter = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Listen no longer."""
        for wrapper in self._wrappers:
            wrapper.remove()
        if self._parameter is not None:
            self._parameter.remove()
            self._parameter, self._told = None, False
        if self._delay is not None:
            self._delay.close()
            self._delay = None
        if self._profiler is not None:
            vars(self._profiler).pop("profile", None)
            self._profiler = None
        self._wrappers, self.open, self.validating = [], [], 0

    def backward_begins(self, loss: Tensor) -> None:
        """From ``on_before_backward``: what is around that hook is the backward pass, which ends with waiting."""
        if self.open and not self.validating:
            self._around, self.open[-1] = self.open[-1], BACKWARD
        # The engine calls what is queued in the order of queueing, and DDP queues its own, which waits for the
        # reductions, when the last gradient is there.
        if not self._told and loss.requires_grad:  # the parameter may be frozen, unused or sharded
            loss.register_hook(self._at_the_loss)  # type: ignore[no-untyped-call]
        self._told = False

    def backward_has_ended(self) -> None:
        """From ``on_after_backward``: around that hook is what was around the backward pass."""
        if self.open and not self.validating:
            self.open[-1] = self._around
        if self._delay is not None:
            self._delay_from = self._delay.read() if self.ask_delay else None

    def _at_the_loss(self, gradient: Tensor) -> None:
        Variable._execution_engine.queue_callback(self._gradients_are_there)  # type: ignore[attr-defined]

    def _at_the_parameter(self, parameter: Tensor) -> None:
        if not self._told:
            self._told = True
            Variable._execution_engine.queue_callback(self._gradients_are_there)  # type: ignore[attr-defined]

    def _gradients_are_there(self) -> None:
        self.turn(WAITING)
        if self._delay is not None and self._delay_from is not None:  # from here on it waits for others
            now = self._delay.read()
            self.delayed += now - self._delay_from
            self._delay_from = now
        if self.on_gradients is not None:
            self.on_gradients()

    def phase_of(self, name: str) -> int:
        """The phase of what Lightning marks by a name."""
        if callback := _CALLBACK.match(name):
            return self.index(callback[1])
        return next((phase for words, phase in _BY_NAME if words in name), OTHER)

    def index(self, callback: str) -> int:
        """The place of a callback's name."""
        if len(self.names) == 255:  # a place is one byte
            return OTHER
        if callback not in self.names[len(PHASES) :]:
            self.names.append(callback)
            self.times.append(0.0)
        return self.names.index(callback, len(PHASES))

    def _span_around(self, inner: Callable[..., Any], action_name: str) -> _Both:
        return _Both(self._spans[action_name], inner(action_name))

    def _start(self, inner: Callable[..., Any], action_name: str) -> None:
        self._spans[action_name].__enter__()
        inner(action_name)

    def _stop(self, inner: Callable[..., Any], action_name: str) -> None:
        inner(action_name)
        self._spans[action_name].__exit__()

    def _within(self, phase: int) -> Callable[..., Any]:
        span = _Span(self, phase)

        def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with span:
                return inner(*args, **kwargs)

        return call

    def _validation(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Span(self, VALIDATION):
            self.validating += 1
            try:
                return inner(*args, **kwargs)
            finally:
                self.validating = max(0, self.validating - 1)


class _Span:
    """Of one name, used again and again: what is open is known by the clock, and nothing here."""

    __slots__ = ("clock", "phase")

    def __init__(self, clock: Phases, phase: int) -> None:
        self.clock = clock
        self.phase = phase

    def __enter__(self) -> None:
        """The main thread enters the phase; what it was in goes on behind it."""
        clock, now = self.clock, time.perf_counter()
        clock.times[clock.here] += now - clock.since
        clock.open.append(clock.here)
        clock.here = clock.cell[0] = VALIDATION if clock.validating else self.phase
        clock.since = now
        clock.passed += 1

    def __exit__(self, *_: object) -> None:
        """Back to the phase around it."""
        clock, now = self.clock, time.perf_counter()
        clock.times[clock.here] += now - clock.since
        clock.here = clock.cell[0] = clock.open.pop() if clock.open else OTHER
        clock.since = now


class _Spans(dict[str, _Span]):
    """By the name that Lightning gives; made when a name comes for the first time."""

    def __init__(self, clock: Phases) -> None:
        super().__init__()
        self.clock = clock

    def __missing__(self, name: str) -> _Span:
        span = self[name] = _Span(self.clock, self.clock.phase_of(name))
        return span


class _Both:
    """A span, and the user's profiler within it."""

    def __init__(self, span: _Span, inner: Any) -> None:
        self.span = span
        self.inner = inner

    def __enter__(self) -> Any:
        self.span.__enter__()
        return self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        try:
            return self.inner.__exit__(*error)
        finally:
            self.span.__exit__()
