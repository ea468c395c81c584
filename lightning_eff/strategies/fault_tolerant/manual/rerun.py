"""A ``training_step`` that is run again: after a failure, and on the batches of dead replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from lightning_eff.strategies.fault_tolerant.logged_values import LoggedValues
from lightning_eff.strategies.fault_tolerant.manual.events import BACKWARD, END, Event, Leave, OtherPathError, name_of
from lightning_eff.strategies.fault_tolerant.manual.gradients import NewGradients
from lightning_eff.strategies.fault_tolerant.manual.snapshot import StepSnapshot, with_buffers_of_its_own
from lightning_eff.strategies.fault_tolerant.steps import ShardSteps
from lightning_eff.training.run_parts import set_group_values

if TYPE_CHECKING:
    pass


class RerunSteps(ShardSteps):
    """Events of one ``training_step``, through which each run of it goes until it comes to what is new.

    A run begins with everything as ``training_step`` has found it. Where others have been before, it does nothing
    together with anybody: parameters, gradients and what was reduced are set to what came of it then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fresh = NewGradients()
        self._start: StepSnapshot | None = None  # while training_step runs
        self._events: list[Event] = []
        self._results: list[Any] = []  # of collectives in training_step, by the order of the calls
        self._safe_events = self._safe_results = 0  # that are committed
        self._at = self._result_at = 0  # where the present run is
        self._logged_at = 0  # as many events had been when `_logged` was taken
        self._real_results: Any = None
        self._reduces_more = False  # a collective, since the last commit
        self._unsynced = False  # backward passes reduce nothing for now
        self._leaving = False
        # Of the orphans, at the place where this replica's own run stands.
        self._caught_up = False
        self._orphan_gradients: dict[int, Tensor] = {}
        self._orphans_new: set[int] = set()
        self._orphan_kinds: list[int] = []
        self._next_kinds: list[int] = []  # what comes after that, as far as it can be seen
        self._stopped_at: list[int] = []
        self._dtype = torch.get_default_dtype()
        self._complaint: str | None = None

    def _keep_start(self) -> None:
        """All is as training_step finds it."""
        super().begin()  # the buffers
        self._fresh.listen(self.module.parameters())
        self._dtype = torch.get_default_dtype()
        self._start = StepSnapshot(self.trainer, again=True)
        self._real_results = self.trainer.fit_loop.epoch_loop._results
        self._logged = LoggedValues(self._real_results, self.module)
        self._events, self._results = [], []
        self._safe_events = self._safe_results = self._logged_at = 0
        self._orphan_values, self._complaint = [], None

    def _forget_start(self) -> None:
        """Nothing of this training_step is run again."""
        self._note_changes()
        self._start, self._events, self._results, self._orphan_gradients = None, [], [], {}

    # A run.

    def _begin_run(self) -> None:
        del self._events[self._safe_events :], self._results[self._safe_results :]
        self._at = self._result_at = self._count = 0
        self._leaving = self._reduces_more = self._caught_up = self._unsynced = False
        self._next_kinds = []
        self._fresh.forget(self.module.parameters())
        if self._logged_at > 0:  # it is logged already
            self.trainer.fit_loop.epoch_loop._results = type(self._real_results)(training=True)
        else:
            self._log_from_here()

    def _log_from_here(self) -> None:
        assert self._logged is not None
        self.trainer.fit_loop.epoch_loop._results = self._real_results
        self._logged.restore()

    def _end_run(self) -> None:
        self._count = None
        self.trainer.fit_loop.epoch_loop._results = self._real_results

    @property
    def _comes_again(self) -> bool:
        """Whether others have been where the present run is."""
        return self._at < len(self._events)

    def _repeat(self, kind: int) -> None:
        """Take what came of it when others were here."""
        event = self._events[self._at]
        if event.kind != kind:
            raise OtherPathError(
                "training_step was run again, as ddp_ft does after a failure and for a dead replica, and went another "
                f"way: it has come to {name_of(kind)}, and before to {name_of(event.kind)}. Steps may not depend on "
                "the batch, nor on what training_step remembers outside of the module's attributes"
            )
        for parameter, value in event.parameters:
            parameter.data.copy_(value)
        for parameter, gradient in event.gradients:
            parameter.grad = None if gradient is None else gradient.detach().clone()
        if event.groups is not None:
            set_group_values(self.trainer, event.groups)
        self._fresh.forget(parameter for parameter, _ in event.gradients)
        self._advance()

    def _advance(self) -> None:
        self._at += 1
        if self.aside:
            return
        if self._at == self._logged_at and self.trainer.fit_loop.epoch_loop._results is not self._real_results:
            self._log_from_here()
        elif self._logged_at < self._at <= self._safe_events:  # a peer's part, which is logged as it comes by
            self._log_is_safe()

    def _log_is_safe(self) -> None:
        self._logged, self._logged_at = LoggedValues(self._real_results, self.module), self._at

    def _leave(self) -> NoReturn:
        self._leaving = True
        raise Leave

    def _check_not_caught(self) -> None:
        if self._leaving:
            raise RuntimeError(
                "training_step has caught BaseException, by which ddp_ft leaves it when a replica has died: catch "
                "Exception instead"
            )

    # What training_step reduces itself.

    def recorded(self, operate: Callable[[], Any], alone: Any) -> Any:
        """A collective in training_step; a run that comes by again gets the same result."""
        if self.aside or self._leaving:
            return alone
        if self._count is None:
            return operate()
        index, self._result_at = self._result_at, self._result_at + 1
        if index == len(self._results):
            self._reduces_more = True
            self._results.append(operate())
        result = self._results[index]
        return result.clone() if isinstance(result, Tensor) else result

    def reduced(self, value: Tensor, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """As in automatic optimization; the neighbours' runs have to come as far as this one."""
        if self._count is not None and not self.aside and self._result_at == len(self._results):
            self._catch_up()
        return super().reduced(value, combine)

    @contextmanager
    def _of_no_shard(self) -> Iterator[None]:
        """What callbacks reduce is of the replicas, and not repeated with training_step."""
        count, self._count = self._count, None
        try:
            yield
        finally:
            self._count = count

    # Dead replicas' shards.

    def _catch_up(self) -> None:
        """Run training_step on the orphans' batches, up to where this replica's own run waits for them."""
        if self._caught_up:
            return
        self._orphan_values, self._orphan_kinds, self._orphan_gradients, self._orphans_new = [], [], {}, set()
        self._caught_up, self._next_kinds = True, []
        if not self.orphans:
            return
        assert self._start is not None
        trainer: Any = self.trainer
        own = StepSnapshot(trainer, again=False)
        logged = LoggedValues(self._real_results, self.module)
        held = self._fresh.held(), self._at, self._unsynced, trainer.profiler
        self.aside = True
        trainer.profiler = PassThroughProfiler()  # the other may be in the midst of this replica's own step
        torch.clear_autocast_cache()  # where it is of these weights, which are others now
        try:
            for shard in self.orphans:
                self._start.restore()
                with_buffers_of_its_own(self.module)
                self._values, self._at, self._unsynced = [], 0, False
                self._fresh.forget(self.module.parameters())
                kind, *after = self._run_aside(shard, self.window[-1])
                self._orphan_kinds.append(kind)
                self._next_kinds += after
        except OtherPathError as error:
            self._complaint = str(error)  # the others have to know
        finally:
            self.aside = False
            own.restore()
            logged.restore()
            torch.clear_autocast_cache()
            fresh, self._at, self._unsynced, trainer.profiler = held
            self._fresh.take(fresh)

    def _stop(self, kind: int) -> None:
        """A neighbour's run has to wait here. After a backward pass it goes on a little, to see what comes next."""
        self._stopped_at.append(kind)
        if len(self._stopped_at) == 2:
            raise Leave
        self._orphan_values.append(self._values.copy())
        for parameter in self.module.parameters():
            if self._fresh.has(parameter):
                self._orphans_new.add(id(parameter))
            if parameter.grad is not None:
                mine, other = parameter.grad.detach(), self._orphan_gradients.get(id(parameter))
                self._orphan_gradients[id(parameter)] = mine.clone() if other is None else other.add_(mine)
        if kind != BACKWARD:
            raise Leave

    def _see_others_at(self, kind: int) -> None:
        """Complain if a dead replica's batch does not lead here."""
        if not self._caught_up and (not self._next_kinds or any(other != kind for other in self._next_kinds)):
            self._catch_up()  # with the gradients of all shards it may go another way
        for other in self._orphan_kinds if self._caught_up else []:
            if other != kind:
                self._complaint = f"on a dead replica's batch it has come to {name_of(other)}"

    def _load(self, shard: int, index: int) -> Any:
        """Data are loaded, and their workers are forked, as if not in the midst of training_step."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with torch.autocast("cpu", enabled=False), torch.enable_grad():
                return super()._load(shard, index)
        finally:
            torch.set_default_dtype(dtype)

    def _run_aside(self, shard: int, index: int) -> list[int]:
        """Run another shard until it has to wait for this one; what it has come to is returned."""
        self._stopped_at = []
        with self._beside(shard, index) as training_step, suppress(Leave):
            training_step()
            self._stop(END)
        return self._stopped_at
