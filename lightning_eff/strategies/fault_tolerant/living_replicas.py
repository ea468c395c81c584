"""What the replicas of a fault-tolerant run do together, over those that live."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities import rank_zero_only as pytorch_rank_zero_only
from torch import Tensor
from torch.distributed import ReduceOp
from typing_extensions import override

from lightning_eff.strategies.fault_tolerant.operations import (
    combine,
    gather_objects,
    gather_tensors,
    mean_of,
    reduce,
    send_object,
)
from lightning_eff.strategies.fault_tolerant.replica_group import ReplicaGroup
from lightning_eff.strategies.fault_tolerant.writer import NewerCheckpoints, begin_to_write
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.whole_files import Attempts, write_whole

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_eff.strategies.fault_tolerant.fit import Fit
    from lightning_eff.strategies.fault_tolerant.membership import Membership

    _Base = DDPStrategy
else:
    _Base = object

# Lightning's barriers around data loaders, which a replica that comes in later has behind it already.
_NO_BARRIER = ("_dataloader()",)


class LivingReplicas(_Base):
    """Lightning's collectives, ranks and checkpoints over the living replicas; each is a world of its own.

    To be put before the ``DDPStrategy`` of either name of Lightning.

    Args:
        replica: index of this one.
        max_replicas: how many there can be.
        shrinks: whether the shards of dead replicas are left out.
        **kwargs: of ``DDPStrategy``.
    """

    replicas_are_equal = True  # one of them writes for all

    def __init__(self, replica: int, max_replicas: int, shrinks: bool, **kwargs: Any) -> None:
        super().__init__(process_group_backend="gloo", **kwargs)
        self.replica = replica
        self.max_replicas = max_replicas
        self.shrinks = shrinks
        self._group = ReplicaGroup()  # the processes of this replica
        self._fitting: Fit | None = None  # what there is only within a fit
        self._writes = False
        self._saves = Attempts("a checkpoint", "without it")
        self._newer = NewerCheckpoints()

    @property
    def _fit(self) -> Fit:
        if self._fitting is None:
            raise RuntimeError("ddp_ft makes steps in `Trainer.fit`, and nowhere else")
        return self._fitting

    @property
    def replicas(self) -> Membership | None:
        """The others, while it fits."""
        return None if self._fitting is None else self._fitting.replicas

    @property
    def _met(self) -> Membership | None:
        """The others, once this replica is among them."""
        return self.replicas if self.replicas is not None and self.replicas.joined else None

    @property
    def _alone(self) -> bool:
        """While this process heals, and after an exception here: nobody else knows of it."""
        fit = self._fitting
        return fit is not None and (fit.heals or fit.trainer.interrupted)

    @property
    def within_step(self) -> bool:
        """Whether a step has begun that the replicas have not all committed."""
        return self._met is not None and not self._fit.heals and self._met.in_attempt

    @property
    @override
    def global_rank(self) -> int:
        """0 on the replica that writes checkpoints and logs, which may change with every step."""
        return self._rank_of_replica * self._group.size + self._group.rank

    @property
    def _rank_of_replica(self) -> int:
        if (met := self._met) is None:
            first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            return self.replica if first_start else max(1, self.replica)
        members, writer = met.members, met.writer
        if self.replica == writer:
            return 0
        rank = members.index(self.replica)
        return rank if rank > 0 else members.index(writer) if writer in members else 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self._group.size, "rank": self._group.rank}

    @override
    def set_world_ranks(self) -> None:
        for each in (rank_zero_only, pytorch_rank_zero_only):
            cast(Any, each).rank = self.global_rank
        if self._met is not None and self._writes != self.is_global_zero:
            self._writes = self.is_global_zero
            if self._writes:
                begin_to_write(self._fit.trainer)

    def _rank_and_size(self) -> tuple[int, int]:
        """This process's rank among those of the living replicas, and how many they are."""
        rank, size = self._group.rank, self._group.size
        if (met := self._met) is None:
            return rank, size
        return met.members.index(self.replica) * size + rank, len(met.members) * size

    # What all living replicas do together.

    def _together(self, operation: Callable[[Any], Any], alone: Any) -> Any:
        """An operation that the first process of each living replica does for its own.

        Args:
            operation: on what connects the first processes.
            alone: the result where there are no others: before the first step, or when the run is over.
        """
        if (met := self._met) is None:
            return alone
        if met.in_attempt:
            return self._fit.steps.recorded(partial(met.within, operation, alone), alone)
        result = met.agree(operation, alone)
        self.set_world_ranks()
        return result

    @override
    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: ReduceOp | str | None = "mean") -> Tensor:
        """Over the living replicas; what ``training_step`` logs, over all shards that they compute."""
        if not isinstance(tensor, Tensor):
            return tensor
        value = tensor.detach().to("cpu", copy=True)
        name = str(reduce_op).rpartition(".")[2].lower()
        size, count = self._group.size, None
        if self._fitting is not None:
            value, of_step = self._fit.steps.reduced(value, partial(combine, name=name))
            if self._fit.steps.aside:
                return tensor
            count = self.max_replicas * size if of_step and not self.shrinks else None
        if self._alone:
            return value.to(tensor.device)
        if size > 1:
            value = combine(self._group.stack(value), name)
        alone = mean_of(value, name, size)
        result: Tensor = self._together(lambda group: reduce(group, value.clone(), name, count, size), alone)
        return result.to(tensor.device)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return bool(self.reduce(torch.tensor(int(decision)), reduce_op="min" if all else "max"))

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if name is None or not name.endswith(_NO_BARRIER):
            self.reduce(torch.zeros(1), reduce_op="sum")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """From the replica that writes."""
        if self._alone:
            return obj
        if (met := self._met) is None:
            return self._group.share(obj)

        def operation(group: Any) -> Any:
            return send_object(group, obj, met.members.index(cast(int, met.writer)))

        return self._together(operation, obj)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From all processes of the living replicas, stacked; without gradients.

        Raises:
            MisconfigurationException: ``sync_grads=True`` where gradients would be lost.
        """
        if sync_grads and torch.is_grad_enabled() and tensor.requires_grad:
            raise MisconfigurationException(
                "all_gather(sync_grads=True) is not supported by ddp_ft: a backward pass through it would wait for "
                "replicas that may die over it. Gather with sync_grads=False, and put this replica's own tensor into "
                "its place, whose gradient is then that of its own loss alone; or train with strategy='ddp'"
            )
        if self._alone or (self._met is None and self._group.size == 1):
            return tensor
        values = self._group.stack(tensor.detach().cpu())
        result: Tensor = self._together(lambda group: torch.cat(gather_tensors(group, values)), values)
        return result.to(tensor.device)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of different shapes."""
        if self._alone:
            return [tensor]
        values = self._group.gather(tensor.detach().cpu())
        parts: list[Tensor] = self._together(
            lambda group: [part for parts in gather_objects(group, values) for part in parts], values
        )
        return parts

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """By the replica that writes, or by the next one if it dies over it. The file appears when it is complete.

        A disk that fails is a warning, and what was saved before is kept.
        """
        while True:
            writes = self.is_global_zero
            if writes:
                step = int(checkpoint["global_step"])
                look = partial(self._newer.refuse_older, filepath, step)
                write = partial(write_whole, self.checkpoint_io, checkpoint, filepath, storage_options, look)
                if self._saves(write):
                    self._newer.note_own(filepath, step)
            if self.is_written(writes):
                return

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """By the replica that writes; not where a later one could not be written."""
        if not self._saves.failing:
            super().remove_checkpoint(filepath)

    def is_written(self, here: bool) -> bool:
        """Whether any living replica has written something; if not, who should have died over it.

        Args:
            here: whether this one has. Who writes may just have changed.
        """
        return self._alone or self._met is None or self.reduce_boolean_decision(here, all=False)
