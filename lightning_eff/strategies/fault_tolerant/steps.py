"""Optimizer steps in terms of shards: what the strategy asks for, and how Lightning's own loop makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.strategies.fault_tolerant.buffers import Buffers
from lightning_eff.strategies.fault_tolerant.comm_hook import ShardGradients
from lightning_eff.strategies.fault_tolerant.logged_values import LoggedValues
from lightning_eff.strategies.fault_tolerant.membership import Membership
from lightning_eff.strategies.fault_tolerant.passes import OrphanPasses, Passes
from lightning_eff.strategies.fault_tolerant.shard_values import ShardValues
from lightning_eff.strategies.fault_tolerant.step_in_hand import Assignment, StepInHand
from lightning_eff.training.logged import accumulators

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.process_group import Gloo


class Steps(ABC):
    """The steps of a fit, and the parts that they are made of.

    Args:
        trainer: which is fitting.
        gradients: of DDP's hook.
        shard: this replica's own.
        replicas: the others.
        share_out: called when the members have changed; calls `assign`.
    """

    def __init__(
        self,
        trainer: Trainer,
        gradients: ShardGradients,
        shard: int,
        replicas: Membership,
        share_out: Callable[[], None],
    ) -> None:
        self.trainer = trainer
        self.gradients = gradients
        self.replicas = replicas
        self.share_out = share_out
        self.step = StepInHand(shard)
        self.passes = Passes(trainer, self.step, gradients)
        self.buffers = Buffers(trainer.lightning_module)
        self.values = ShardValues()

    @property
    def module(self) -> LightningModule:
        """The user's."""
        return self.trainer.lightning_module

    @property
    def window(self) -> list[int]:
        """Indices of the micro-batches of the step in hand; empty between steps."""
        return self.step.window

    @property
    def aside(self) -> bool:
        """Whether a micro-batch runs beside Lightning's loop."""
        return self.passes.aside

    def assign(self, assignment: Assignment) -> None:
        """What this replica computes from now on."""
        self.step.assign(assignment)
        self.gradients.divide_by(assignment.divisor)

    @abstractmethod
    def begin(self) -> None:
        """The first micro-batch of a step is next, and the weights are what they are."""

    def end(self) -> None:
        """The step is over."""
        self.step.end()
        self.gradients.forget_orphans()

    def close(self) -> None:
        """The run is over."""
        self.step.close()

    # What Lightning's loop does.

    @abstractmethod
    def run(self, training_step: Callable[[], Any]) -> Any:
        """This replica's ``training_step`` on the micro-batch in hand."""

    @abstractmethod
    def backward(self, loss: Tensor, usual: Callable[[], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A backward pass, which is ``usual`` where Lightning makes the steps; more arguments are of the user's."""

    @abstractmethod
    def without_sum(self) -> Any:
        """A context around micro-batches, or backward passes, that reduce nothing."""

    @abstractmethod
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], update: Callable[[Once], Any]) -> Any:
        """Update when all replicas have the gradients, and only then; gives the closure's loss."""

    def share_buffers(self, together: Callable[[Callable[[Gloo], Any], Any], Any]) -> None:
        """All have the buffers of one replica, by the members' ``settle`` or ``agree``."""
        changes = self.buffers.changes()
        if self.buffers:
            changes = self.gradients.sums.group.stack(changes).amax(0)
        self.buffers.adopt(together(partial(self.buffers.share, changes), None))

    # What training_step reduces itself.

    def reduced(self, value: Tensor, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """What this replica gives to a reduction; see `ShardValues.combined`."""
        if self.aside:
            self.values.collect(value)
            return value, False
        return self.values.combined(value, combine)

    def recorded(self, operate: Callable[[], Any], alone: Any) -> Any:
        """The result of a collective within a step; a dead replica's batch takes part in none."""
        return alone if self.aside else operate()

    # State, for a peer and from a peer.

    def handover(self) -> dict[str, Any]:
        """For a replica that takes this one's state."""
        return {}

    def take_over(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take what a peer's `handover` gave, after all else."""


class AutomaticSteps(Steps):
    """Steps that Lightning makes: one backward pass for each micro-batch, one update."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.orphans = OrphanPasses(self.passes, self.buffers, self.values)
        self._logged: LoggedValues | None = None

    @override
    def begin(self) -> None:
        self.gradients.forget_orphans()
        self.values.forget_orphans()
        self.buffers.begin()

    @override
    def run(self, training_step: Callable[[], Any]) -> Any:
        index = self.step.index
        self._logged = LoggedValues(accumulators(self.trainer), self.module)
        self.orphans.run(index)
        with (
            self.values.counted(),
            self.passes.random(self.step.shard, index),
            self.step.assignment.watching(),
        ):
            return training_step()

    @override
    def backward(self, loss: Tensor, usual: Callable[[], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return usual()

    @override
    @contextmanager
    def without_sum(self) -> Iterator[None]:
        with self.passes.approximately():
            yield

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], update: Callable[[Once], Any]) -> Any:
        """Repeat the step until it is committed."""
        replicas = self.replicas
        while True:
            self.gradients.begin()
            replicas.last_part()
            with self.passes.approximately():
                loss = closure()
            if not self.gradients.launched:
                raise RuntimeError("training_step returned None: with ddp_ft, as with DDP, every replica needs a loss")
            self.gradients.finish()
            if replicas.commit():
                update(Once(loss))
                break
            if replicas.again():
                break
            self.share_out()
            self._undo()
        self.share_buffers(replicas.settle)
        self.end()
        return loss

    def _undo(self) -> None:
        """Undo an attempt, and compute it again up to the micro-batch that Lightning itself repeats."""
        if self._logged is not None:
            self._logged.restore()
        self.gradients.forget_orphans()
        self.buffers.restore()
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        for index in self.window[:-1]:
            self.orphans.run(index)
            self.passes.accumulate(self.step.shard, index)


class Once:
    """A closure for the optimizer, of a loss that is there already."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.called = False

    def __call__(self) -> Any:
        """The loss, once."""
        if self.called:
            raise RuntimeError("ddp_ft evaluates the loss once a step, but the optimizer has asked for it again")
        self.called = True
        return self.loss
