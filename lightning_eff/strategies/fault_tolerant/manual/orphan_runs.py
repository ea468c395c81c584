"""A ``training_step`` that makes its own steps, run on the batches of dead replicas, as far as this replica's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from lightning_eff.strategies.fault_tolerant.manual.events import BACKWARD, END, Leave, OtherPathError, name_of
from lightning_eff.strategies.fault_tolerant.manual.gradients import NewGradients
from lightning_eff.strategies.fault_tolerant.manual.replay import Replay
from lightning_eff.strategies.fault_tolerant.manual.snapshot import StepSnapshot, with_buffers_of_its_own
from lightning_eff.strategies.fault_tolerant.passes import Passes
from lightning_eff.strategies.fault_tolerant.shard_values import ShardValues


class OrphanRuns:
    """Runs of ``training_step`` on the orphans' batches, each from the start up to where this replica's own run stands.

    Args:
        passes: what a run is made of.
        values: what they give to reductions.
        replay: of this training_step.
        fresh: which gradients are new.
    """

    def __init__(self, passes: Passes, values: ShardValues, replay: Replay, fresh: NewGradients) -> None:
        self.passes = passes
        self.values = values
        self.replay = replay
        self.fresh = fresh
        self.gradients: dict[int, Tensor] = {}
        """Sums over the orphans, by ``id`` of the parameter."""
        self.new: set[int] = set()
        """Parameters of which an orphan has a gradient that is new."""
        self.complaint: str | None = None
        """Why a run went another way, which the others have to know."""
        self._caught_up = False
        self._kinds: list[int] = []  # what each has come to
        self._next_kinds: list[int] = []  # what comes after that, as far as it can be seen
        self._stopped_at: list[int] = []
        self._dtype = torch.get_default_dtype()
        self.values.forget_orphans()

    @property
    def _trainer(self) -> Trainer:
        return self.passes.trainer

    @property
    def _module(self) -> LightningModule:
        return self.passes.module

    def start_over(self) -> None:
        """Another run, or another part: nothing is known of what the orphans come to."""
        self._caught_up, self._next_kinds = False, []

    def fall_behind(self) -> None:
        """This replica's own run goes on."""
        self._caught_up = False

    def catch_up(self) -> None:
        """Run training_step on the orphans' batches, up to where this replica's own run waits for them."""
        if self._caught_up:
            return
        self._kinds, self.gradients, self.new = [], {}, set()
        self._caught_up, self._next_kinds = True, []
        self.values.forget_orphans()
        orphans = self.passes.step.assignment.orphans
        if not orphans:
            return
        trainer: Any = self._trainer
        own = StepSnapshot(trainer, again=False)
        profiler, trainer.profiler = trainer.profiler, PassThroughProfiler()  # it may be in the midst of a step
        torch.clear_autocast_cache()  # where it is of these weights, which are others now
        with self.passes.run_aside(), self.replay.aside(), self.fresh.put_aside():
            try:
                for shard in orphans:
                    self.replay.start.restore()
                    with_buffers_of_its_own(self._module)
                    self.replay.from_the_start()
                    self.values.begin_orphan()
                    kind, *after = self._run(shard)
                    self._kinds.append(kind)
                    self._next_kinds += after
            except OtherPathError as error:
                self.complaint = str(error)
            finally:
                own.restore()
                torch.clear_autocast_cache()
                trainer.profiler = profiler

    def _run(self, shard: int) -> list[int]:
        """Run another shard until it has to wait for this one; what it has come to is returned."""
        self._stopped_at = []
        beside = self.passes.beside(shard, self.passes.step.index, loading=self._outside())
        with beside as training_step, suppress(Leave):
            training_step()
            self.stop(END)
        return self._stopped_at

    def stop(self, kind: int) -> None:
        """A run aside has to wait here. After a backward pass it goes on a little, to see what comes next."""
        self._stopped_at.append(kind)
        if len(self._stopped_at) == 2:
            raise Leave
        self.values.end_orphan()
        for parameter in self._module.parameters():
            if self.fresh.has(parameter):
                self.new.add(id(parameter))
            if parameter.grad is not None:
                mine, other = parameter.grad.detach(), self.gradients.get(id(parameter))
                self.gradients[id(parameter)] = mine.clone() if other is None else other.add_(mine)
        if kind != BACKWARD:
            raise Leave

    def stop_again(self, kind: int) -> None:
        """Before a pass that the orphan need not make: it has stopped already, and only shows what comes next."""
        if self._stopped_at:
            self.stop(kind)

    def see_at(self, kind: int) -> None:
        """Complain if a dead replica's batch does not lead here."""
        if not self._caught_up and (not self._next_kinds or any(other != kind for other in self._next_kinds)):
            self.catch_up()  # with the gradients of all shards it may go another way
        for other in self._kinds if self._caught_up else []:
            if other != kind:
                self.complaint = f"on a dead replica's batch it has come to {name_of(other)}"

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Data are loaded, and their workers are forked, as if not in the midst of training_step."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with torch.autocast("cpu", enabled=False), torch.enable_grad():
                yield
        finally:
            torch.set_default_dtype(dtype)
