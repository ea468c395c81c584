"""A ``training_step`` that is run again, until it comes to what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_eff.strategies.fault_tolerant.logged_values import LoggedValues
from lightning_eff.strategies.fault_tolerant.manual.events import Event, Leave, OtherPathError, name_of
from lightning_eff.strategies.fault_tolerant.manual.gradients import NewGradients
from lightning_eff.strategies.fault_tolerant.manual.snapshot import StepSnapshot
from lightning_eff.training.hooks import ReadsWeights, tell
from lightning_eff.training.logged import accumulators, set_accumulators
from lightning_eff.training.run_parts import set_group_values


class Replay:
    """Events of one ``training_step``, through which each run of it goes; made when it begins, gone when it ends.

    A run begins with everything as ``training_step`` has found it. Where others have been before, it does nothing
    together with anybody: parameters, gradients and what was reduced are set to what came of it then.

    Args:
        trainer: which is fitting.
        fresh: which gradients are this replica's own.
    """

    def __init__(self, trainer: Trainer, fresh: NewGradients) -> None:
        self.trainer = trainer
        self.fresh = fresh
        self.start = StepSnapshot(trainer, again=True)
        """All as training_step has found it."""
        self.unsynced = False
        """Whether backward passes reduce nothing for now."""
        self.reduces_more = False
        """Whether there was a collective in training_step since the last commit."""
        self._leaving = False
        self._events: list[Event] = []
        self._results: list[Any] = []  # of collectives in training_step, by the order of the calls
        self._safe_events = self._safe_results = 0  # that are committed
        self._at = self._result_at = 0  # where the present run is
        self._aside = False
        self._real_results = accumulators(trainer)
        self._logged = LoggedValues(self._real_results, trainer.lightning_module)
        self._logged_at = 0  # as many events had been when `_logged` was taken

    # A run.

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around a run of training_step, this replica's own."""
        del self._events[self._safe_events :], self._results[self._safe_results :]
        self._at = self._result_at = 0
        self._leaving = self.reduces_more = self.unsynced = False
        self.fresh.forget(self.trainer.lightning_module.parameters())
        if self._logged_at > 0:  # it is logged already
            set_accumulators(self.trainer, None)
        else:
            self._log_from_here()
        try:
            yield
        finally:
            set_accumulators(self.trainer, self._real_results)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around runs on other shards' batches; each begins with `from_the_start`."""
        at, unsynced = self._at, self.unsynced
        logged = LoggedValues(self._real_results, self.trainer.lightning_module)
        self._aside = True
        try:
            yield
        finally:
            self._aside, self._at, self.unsynced = False, at, unsynced
            logged.restore()

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Around backward passes that reduce nothing."""
        before, self.unsynced = self.unsynced, True
        try:
            yield
        finally:
            self.unsynced = before

    def from_the_start(self) -> None:
        """Everything is as training_step has found it, for a run aside."""
        self._at, self.unsynced = 0, False
        self.fresh.forget(self.trainer.lightning_module.parameters())

    def leave(self) -> NoReturn:
        """End this run before its end: the part that it was in has failed."""
        self._leaving = True
        raise Leave

    def check_not_caught(self) -> None:
        """Where a run goes on after `leave`, training_step is at fault."""
        if self._leaving:
            raise RuntimeError(
                "training_step has caught BaseException, by which ddp_ft leaves it when a replica has died: catch "
                "Exception instead"
            )

    # Events.

    @property
    def comes_again(self) -> bool:
        """Whether others have been where the present run is."""
        return self._at < len(self._events)

    @property
    def in_a_peers_part(self) -> bool:
        """Whether the event here stands for a whole part, with all backward passes in it."""
        return self.comes_again and self._events[self._at].whole

    @property
    def uncommitted(self) -> int:
        """Events since the last commit."""
        return len(self._events) - self._safe_events

    def repeat(self, kind: int) -> None:
        """Take what came of it when others were here."""
        event = self._events[self._at]
        if event.kind != kind:
            raise OtherPathError(
                "training_step was run again, as ddp_ft does after a failure and for a dead replica, and went another "
                f"way: it has come to {name_of(kind)}, and before to {name_of(event.kind)}. Steps may not depend on "
                "the batch, nor on what training_step remembers outside of the module's attributes"
            )
        if event.parameters:
            tell(self.trainer, ReadsWeights)
        for parameter, value in event.parameters:
            parameter.data.copy_(value)
        for parameter, gradient in event.gradients:
            parameter.grad = None if gradient is None else gradient.detach().clone()
        if event.groups is not None:
            set_group_values(self.trainer, event.groups)
        self.fresh.forget(parameter for parameter, _ in event.gradients)
        self._advance()

    def add(self, event: Event) -> None:
        """What has just come of something that all did together; it is not committed."""
        self._events.append(event)
        self._advance()

    def add_committed(self, event: Event) -> None:
        """The same of the end of a part, which all replicas have."""
        self._events.append(event)
        self._at += 1
        self._all_is_safe()
        self._log_is_safe()

    def adopt(self, event: Event, results: list[Any]) -> None:
        """A peer's part in place of the one that failed here, with the results of its collectives."""
        del self._events[self._safe_events :]
        self._events.append(event)
        self._results = list(results)
        self._all_is_safe()

    def _all_is_safe(self) -> None:
        self._safe_events, self._safe_results = len(self._events), len(self._results)
        self.reduces_more = False

    def _advance(self) -> None:
        self._at += 1
        if self._aside:
            return
        if self._at == self._logged_at and accumulators(self.trainer) is not self._real_results:
            self._log_from_here()
        elif self._logged_at < self._at <= self._safe_events:  # a peer's part, which is logged as it comes by
            self._log_is_safe()

    def _log_from_here(self) -> None:
        set_accumulators(self.trainer, self._real_results)
        self._logged.restore()

    def _log_is_safe(self) -> None:
        self._logged = LoggedValues(self._real_results, self.trainer.lightning_module)
        self._logged_at = self._at

    # What training_step reduces itself.

    @property
    def reduces_anew(self) -> bool:
        """Whether the next collective in training_step is one that no run has come to before."""
        return self._result_at == len(self._results)

    @property
    def results(self) -> list[Any]:
        """Of the collectives in training_step."""
        return self._results

    def recorded(self, operate: Callable[[], Any], alone: Any) -> Any:
        """A collective in training_step; a run that comes by again gets the same result."""
        if self._leaving:
            return alone
        index, self._result_at = self._result_at, self._result_at + 1
        if index == len(self._results):
            self.reduces_more = True
            self._results.append(operate())
        result = self._results[index]
        return result.clone() if isinstance(result, Tensor) else result
