"""A module's own torchmetrics, computed over the living replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric


class Gather:
    """In place of torchmetrics' gathering, which wants torch's own process group.

    A copy of the module shares it: it leads to the strategy, which must not be copied.

    Args:
        gather: a tensor -> that of each living replica, of any shapes.
        among: how many they are.
    """

    def __init__(self, gather: Callable[[Tensor], list[Tensor]], among: Callable[[], int]) -> None:
        self.gather = gather
        self.among = among

    def __call__(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """The tensor of each living replica."""
        return [part.to(tensor.device) for part in self.gather(tensor)]

    def __deepcopy__(self, memo: Any) -> Gather:
        return self


class Several:
    """Whether there is anybody to gather from."""

    def __init__(self, among: Callable[[], int]) -> None:
        self.among = among

    def __call__(self) -> bool:
        """Now."""
        return self.among() > 1

    def __deepcopy__(self, memo: Any) -> Several:
        return self


def compute_together(module: nn.Module, gather: Gather | None) -> None:
    """Let a module's metrics gather in this way, or as they do by themselves with None."""
    for metric in module.modules():
        if isinstance(metric, Metric):
            if gather is not None:
                metric.dist_sync_fn = gather
                metric.distributed_available_fn = Several(gather.among)
            elif isinstance(metric.dist_sync_fn, Gather):
                from torchmetrics.metric import jit_distributed_available
                from torchmetrics.utilities.distributed import gather_all_tensors

                metric.dist_sync_fn = gather_all_tensors
                metric.distributed_available_fn = jit_distributed_available
