"""What there is of ddp_ft while a Trainer fits, from its setup to its end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lightning_eff.strategies.fault_tolerant.comm_hook import ShardGradients
from lightning_eff.strategies.fault_tolerant.healing import layout, live_state, load_live_state, size
from lightning_eff.strategies.fault_tolerant.log import ReplicaLog
from lightning_eff.strategies.fault_tolerant.manual.steps import ManualSteps
from lightning_eff.strategies.fault_tolerant.mecefo import approximated
from lightning_eff.strategies.fault_tolerant.replica_group import GradientSums, GroupMembership, ReplicaGroup
from lightning_eff.strategies.fault_tolerant.step_in_hand import Assignment, shares
from lightning_eff.strategies.fault_tolerant.steps import AutomaticSteps, Steps
from lightning_eff.training.hooks import HearsOfTheEnd, tell

if TYPE_CHECKING:
    from lightning_eff.functional.mecefo import MeCeFO
    from lightning_eff.strategies.fault_tolerant.identity import Identity
    from lightning_eff.strategies.fault_tolerant.limits import Limits
    from lightning_eff.strategies.fault_tolerant.membership import Membership


class Fit:
    """The others, the gradients, the steps, and this replica's state as a peer gets it.

    Args:
        trainer: which fits.
        group: the processes of this replica.
        identity: of this replica.
        limits: how long it waits.
        shrinks: whether the shards of dead replicas are left out.
        all_used: whether each parameter has a gradient in each step.
        mecefo: by which a neighbour's passes are approximated; None for exact ones.

    Raises:
        ConnectionError: the lighthouse cannot be reached.
    """

    def __init__(
        self,
        trainer: Trainer,
        group: ReplicaGroup,
        identity: Identity,
        limits: Limits,
        shrinks: bool,
        all_used: bool,
        mecefo: MeCeFO | None,
    ) -> None:
        from lightning_eff.strategies.fault_tolerant.connect import connected  # torchft is an extra

        self.trainer = trainer
        self.shrinks = shrinks
        self.mecefo = mecefo
        self.heals = False
        """Whether a peer's state is being taken."""
        first = None
        if group.leads:
            first = connected(identity, limits, self.state, self.load, partial(layout, trainer), partial(size, trainer))
        self.replicas: Membership = (
            first
            if first is not None and group.size == 1
            else GroupMembership(group, first, identity.index, identity.count, self.state, self.load)
        )
        self.gradients = ShardGradients(GradientSums(group, None if first is None else first.manager), all_used)
        self.log = ReplicaLog(self.replicas, shrinks)
        kind = AutomaticSteps if trainer.lightning_module.automatic_optimization else ManualSteps
        self.steps: Steps = kind(trainer, self.gradients, identity.index, self.replicas, self.share_out)

    def state(self) -> dict[str, Any]:
        """For a peer."""
        return {**live_state(self.trainer), "log": self.log.held(), **self.steps.handover()}

    def load(self, state: dict[str, Any]) -> None:
        """Take what a peer's `state` gave."""
        self.heals = True
        try:
            self.log.take(state["log"])
            load_live_state(self.trainer, state, within_step=bool(self.steps.window))
            self.steps.take_over(state)
        finally:
            self.heals = False
        self.replicas.has_healed(state)

    def share_out(self) -> None:
        """Which shards this replica computes from now on."""
        replicas = self.replicas
        share = shares(replicas.count, replicas.members)
        orphans = [] if self.shrinks else share[replicas.index]
        divisor = len(replicas.members) if self.shrinks else replicas.count
        assignment = Assignment(replicas.seed, orphans, divisor)
        if self.mecefo is not None:
            assignment = approximated(self.mecefo, assignment, share, replicas.step)
        self.steps.assign(assignment)
        self.trainer.strategy.set_world_ranks()  # type: ignore[attr-defined]

    def end_of_all(self) -> None:
        """All leave, before a step that nobody makes."""
        self.replicas.goes_on(False)
        tell(self.trainer, HearsOfTheEnd)
        self.replicas.depart()

    def close(self) -> None:
        """The end: nobody is reached any more."""
        self.steps.close()
        self.replicas.close()
