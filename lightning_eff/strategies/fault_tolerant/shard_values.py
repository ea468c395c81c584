"""What ``training_step`` reduces, over all shards that a replica computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ShardValues:
    """Values that ``training_step`` gives to its reductions: of this replica's shard, and of each orphan.

    They belong together by the order of the calls.
    """

    def __init__(self) -> None:
        self.count: int | None = None
        """Reductions so far in this replica's own ``training_step``; None outside of it."""
        self._orphans: list[list[Tensor]] = []
        self._collected: list[Tensor] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around this replica's own ``training_step``."""
        self.count = 0
        try:
            yield
        finally:
            self.count = None

    @contextmanager
    def of_no_shard(self) -> Iterator[None]:
        """Around callbacks within it: what they reduce is of the replicas."""
        count, self.count = self.count, None
        try:
            yield
        finally:
            self.count = count

    def forget_orphans(self) -> None:
        """A micro-batch begins."""
        self._orphans = []

    def begin_orphan(self) -> None:
        """An orphan's ``training_step`` begins."""
        self._collected = []

    def collect(self, value: Tensor) -> None:
        """One of an orphan."""
        self._collected.append(value)

    def end_orphan(self) -> None:
        """What was collected is all of it, for now."""
        self._orphans.append(self._collected.copy())

    def combined(self, value: Tensor, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """The value of all of this replica's shards, and whether it belongs to a ``training_step`` at all.

        Args:
            value: of this replica's own micro-batch.
            combine: of values stacked along the first axis, to one that stands for all of them.
        """
        if self.count is None:
            return value, False
        others = [values[self.count] for values in self._orphans if len(values) > self.count]
        self.count += 1
        return (combine(torch.stack([value, *others])) if others else value), True
