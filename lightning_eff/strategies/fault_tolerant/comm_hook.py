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
        self._used: Tensor | None = None

    def begin(self) -> None:
        """Before a backward pass that reduces."""
        self.launched = False
        self.sums.begin()
        self._works = []
        self._buckets = []
        self._used = None

    def finish(self) -> None:
        """After it. DDP leaves a parameter alone that this replica has not used, but others may have used it.

        Raises:
            RuntimeError: a parameter has no gradient, though all should have one.
        """
        missing = [(index, pair) for index, pair in enumerate(self._buckets) if pair[0].grad is None]
        if not missing or self.sums.failed:
            return
        if self.all_used:
            raise RuntimeError(
                f"{len(missing)} parameters had no part in the loss of this step. If that is meant, use "
                "FaultTolerantDDPStrategy(find_unused_parameters=True)"
            )
        assert self._used is not None
        used = self._used.tolist()
        for index, (parameter, gradient) in missing:
            if used[index]:
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
        if not state.all_used:
            flags = [p.grad is not None or id(p) in state.orphans for p, _ in state._buckets]
            state._used = torch.tensor(flags, dtype=torch.int32)
            state._works.append(state.sums.all_reduce(state._used))
        state.sums.finish(state._works)
    done: Future[Tensor] = Future()
    done.set_result(buffer)
    return done
