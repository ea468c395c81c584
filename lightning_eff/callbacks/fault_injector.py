"""Faults by rank and step, to rehearse what a run does about them."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_number, check_text
from lightning_eff.structure import clean_named_parameters
from lightning_eff.structure.select import select
from lightning_eff.training.dtensor import local

Fault = Literal["raise", "kill", "stop", "hang", "slow", "corrupt"]
Hook = Literal[
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


class InjectedError(Exception):
    """Raised on purpose."""


class FaultInjector(Callback):
    """Lets a chosen rank fail in a chosen way at a chosen step, so that a team can rehearse it.

    Once, in a process's first life: what torchrun or ``lightning-eff launch`` has started again is left in peace.

    Runs in: the hook that is given.
    Reads: nothing.
    Changes: with ``"corrupt"`` one bit of one weight.
    Collectives: none.
    Host syncs: none.
    Strategies: all; under ``ddp_ft``, whose replicas have ranks of their own, ``rank`` is that within a replica.

    Args:
        fault: ``"raise"`` raises ``InjectedError``; ``"kill"`` is SIGKILL, to this process; ``"stop"`` is SIGSTOP;
            ``"hang"`` is an endless loop in Python; ``"slow"`` sleeps in every step from ``step`` on; ``"corrupt"``
            flips the lowest bit of the first element of a parameter.
        step: optimizer steps that are done before, >= 0; it comes at the first call of the hook from then on.
        rank: on which; None for every one.
        hook: in which hook of a callback.
        slowdown: of ``"slow"``: the share of a step by which each is longer, > 0.
        seconds: of ``"hang"``: for how long, > 0; None for ever.
        parameter: of ``"corrupt"``: a pattern, the first parameter that it matches; None for the first of all.

    Raises:
        ValueError: an argument out of its range.
        InjectedError: the fault.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import FaultInjector
        >>> trainer = L.Trainer(max_steps=1, callbacks=[FaultInjector("stop", step=500, rank=1)], logger=False)

    Source: ours.
    """

    def __init__(
        self,
        fault: Fault,
        step: int,
        rank: int | None = None,
        hook: Hook = "on_train_batch_start",
        slowdown: float = 0.2,
        seconds: float | None = None,
        parameter: str | None = None,
    ) -> None:
        check_choice("fault", fault, Fault)
        check_count("step", step, least=0)
        check_count("rank", rank, least=0, optional=True)
        check_choice("hook", hook, Hook)
        check_number("slowdown", slowdown, above=0)
        check_number("seconds", seconds, above=0, optional=True)
        check_text("parameter", parameter, optional=True)
        stops = fault != "stop" or hasattr(signal, "SIGSTOP")
        check("fault", fault, stops, "something else on a system without SIGSTOP")
        self.fault: Fault = fault
        self.step = step
        self.rank = rank
        self.hook: Hook = hook
        self.slowdown = slowdown
        self.seconds = seconds
        self.parameter = parameter
        self.fired = False
        """Whether the fault has been there, on this rank."""
        self._began: float | None = None  # the last call of the hook, behind its sleep

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            self.fired = True

    def _called(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        if hook != self.hook or trainer.sanity_checking or self.rank not in (None, trainer.global_rank):
            return
        if trainer.global_step < self.step or (self.fired and self.fault != "slow"):
            return
        if self.fault == "slow":
            self._slow()
            return
        self.fired = True
        if self.fault == "raise":
            raise InjectedError(f"rank {trainer.global_rank}, step {trainer.global_step}, {hook}")
        print(f"FaultInjector: {self.fault} on rank {trainer.global_rank}", file=sys.stderr, flush=True)
        if self.fault == "hang":
            end = time.monotonic() + (self.seconds or float("inf"))
            while time.monotonic() < end:
                time.sleep(0.001)
        elif self.fault == "corrupt":
            self._corrupt(module)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)

    def _slow(self) -> None:
        if self.fired and self._began is None:
            return  # a process that was started again
        if self._began is not None:
            time.sleep(self.slowdown * (time.monotonic() - self._began))
        self.fired, self._began = True, time.monotonic()

    def _corrupt(self, module: LightningModule) -> None:
        parameters = clean_named_parameters(module)
        names = list(parameters) if self.parameter is None else select(list(parameters), self.parameter, "parameter")
        weight = local(parameters[names[0]])
        weight.view(_INTEGERS[weight.element_size()]).view(-1)[0].bitwise_xor_(1)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._called("on_train_batch_start", trainer, pl_module)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._called("on_before_backward", trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._called("on_after_backward", trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._called("on_before_optimizer_step", trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._called("on_train_batch_end", trainer, pl_module)

    @override
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._called("on_validation_batch_start", trainer, pl_module)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._called("on_validation_batch_end", trainer, pl_module)
