"""Gradients of several shards on one replica, and their mean over all replicas through DDP's communication hook."""

# No `from __future__ import annotations` here: DDP looks at the types of its hook.

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

if TYPE_CHECKING:  # torchft is an extra
    from lightning_eff.strategies.fault_tolerant.replica_group import GradientSums


class ShardGradients:
    """State of the communication hook `average_over_shards`.

    Args:
        sums: over all processes of all replicas.
        all_used: whether each parameter has a gradient on each replica, as DDP wants it by default.
    """

    def __init__(self, sums: "GradientSums", all_used: bool = True) -> None:
        self.sums = sums
        self.all_used = all_used
        self.divisor: Callable[[Tensor], float] | float = 1.0
        """By what the sum over replicas is divided: a number, or one for each parameter. For each process of one."""
        self.orphans: dict[int, Tensor] = {}
        """Gradients of other shards, by ``id`` of the parameter, that are added to this replica's own."""
        self.launched = False
        """Whether the last backward pass has reduced anything."""
        self._works: list[Any] = []
        self._buckets: list[tuple[Tensor, Tensor]] = []
        self._used: list[bool] = []  # by parameter of `_buckets`: whether anybody has a gradient of it

    def begin(self) -> None:
        """Before a backward pass that reduces."""
        self.launched = False
        self.sums.begin()
        self._works = []
        self._buckets = []
        self._used = []

    def finish(self) -> None:
        """After it. DDP leaves a parameter alone that this replica has not used, but others may have used it.

        Raises:
            RuntimeError: a parameter has no gradient, though all should have one.
        """
        missing = sum(parameter.grad is None for parameter, _ in self._buckets)
        if not missing or self.sums.failed:
            return
        if self.all_used:
            raise RuntimeError(
                f"{missing} parameters had no part in the loss of this step. If that is meant, use "
                "FaultTolerantDDPStrategy(find_unused_parameters=True)"
            )
        for (parameter, gradient), used in zip(self._buckets, self._used, strict=True):
            if parameter.grad is None and used:
                parameter.grad = gradient.clone()

    def divide_by(self, divisor: Callable[[Tensor], float] | float) -> None:
        """From the next backward pass on; see `divisor`."""
        self.divisor = divisor

    def forget_orphans(self) -> None:
        """Their gradients belong to a step, or an attempt, that is over."""
        self.orphans = {}

    def adopt(self, parameters: list[nn.Parameter]) -> None:
        """Move gradients from the parameters to `orphans`, on top of those that are there."""
        for parameter in parameters:
            if parameter.grad is not None:
                other = self.orphans.get(id(parameter))
                self.orphans[id(parameter)] = parameter.grad if other is None else other.add_(parameter.grad)
                parameter.grad = None


def average_over_shards(state: ShardGradients, bucket: GradBucket) -> Future[Tensor]:
    """Add the orphans' gradients, scale, and sum over the replicas.

    All buckets are awaited in the last one. The future is complete when it is returned, whatever happened, since an
    error in DDP's backward pass would end the process: a failure is noted by the manager, and the step is repeated.
    """
    buffer = bucket.buffer()
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    state._buckets += pairs
    if state.orphans:
        for parameter, gradient in pairs:
            other = state.orphans.get(id(parameter))
            if other is not None:
                gradient.add_(other)
    processes = state.sums.group.size
    if callable(state.divisor):
        for parameter, gradient in pairs:
            gradient.div_(state.divisor(parameter) * processes)
    else:
        buffer.div_(state.divisor * processes)
    state.launched = True
    state._works.append(state.sums.all_reduce(buffer))
    if bucket.is_last():
        flags: list[bool] = []
        if not state.all_used:
            flags = [p.grad is not None or id(p) in state.orphans for p, _ in state._buckets]
        used = torch.tensor(flags, dtype=torch.int32)
        if flags:
            state._works.append(state.sums.all_reduce(used))
        state.sums.finish(state._works)
        state._used = used.bool().tolist()
    done: Future[Tensor] = Future()
    done.set_result(buffer)
    return done
