"""Gradients of several shards on one replica, and their mean over all replicas through DDP's communication hook."""

# No `from __future__ import annotations` here: DDP looks at the types of its hook.

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from lightning_eff.training.quorum import QuorumManager


class ShardGradients:
    """State of the communication hook `average_over_shards`.

    Args:
        manager: torchft's.
    """

    def __init__(self, manager: QuorumManager) -> None:
        self.manager = manager
        self.divisor: Callable[[Tensor], float] | float = 1.0
        """By what the sum over replicas is divided: a number, or one for each parameter."""
        self.orphans: dict[int, Tensor] = {}
        """Gradients of other shards, by ``id`` of the parameter, that are added to this replica's own."""
        self.launched = False
        """Whether the last backward pass has reduced anything."""
        self._works: list[Any] = []

    def begin(self) -> None:
        """Before a backward pass that reduces."""
        self.launched = False
        self._works = []

    def take(self, parameters: list[nn.Parameter]) -> None:
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
    if state.orphans:
        for parameter, gradient in pairs:
            other = state.orphans.get(id(parameter))
            if other is not None:
                gradient.add_(other)
    if callable(state.divisor):
        for parameter, gradient in pairs:
            gradient.div_(state.divisor(parameter))
    else:
        buffer.div_(state.divisor)
    state.launched = True
    state._works.append(state.manager.all_reduce(buffer))
    if bucket.is_last():
        for work in state._works:
            work.wait()
        state._works = []
        if state.manager.errored() is not None:
            state.manager.group.abort()
    done: Future[Tensor] = Future()
    done.set_result(buffer)
    return done
