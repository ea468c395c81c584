"""The step in hand: its micro-batches, and what this replica does in it beside its own shard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader


@dataclass(frozen=True)
class Assignment:
    """What a replica computes while nobody comes or goes."""

    seed: int
    """Of the run."""
    orphans: list[int]
    """Shards of dead replicas that it computes besides its own."""
    divisor: Callable[[Tensor], float] | float
    """By what the sum over replicas is divided: a number, or one for each parameter."""
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    """Makes the context of each forward and backward pass; the steps put it around Lightning's own."""
    watching: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    """Makes the context of the replica's own forward passes."""


def shares(count: int, members: list[int]) -> dict[int, list[int]]:
    """Which shards of dead replicas each living one takes besides its own, evenly.

    >>> shares(4, [0, 2, 3])
    {0: [], 2: [1], 3: []}
    >>> shares(4, [1])
    {1: [0, 2, 3]}
    """
    share: dict[int, list[int]] = {member: [] for member in members}
    for orphan in range(count):
        if orphan not in share:
            neighbour = min(members, key=lambda member: (len(share[member]), (member - orphan) % count))
            share[neighbour].append(orphan)
    return share


class StepInHand:
    """The one owner of which micro-batches and shards are in hand.

    Args:
        shard: this replica's own.
    """

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.assignment = Assignment(seed=0, orphans=[], divisor=1.0)
        self.window: list[int] = []
        """Indices of its micro-batches so far; empty between steps."""
        self._loader: ShardedLoader | None = None

    @property
    def loader(self) -> ShardedLoader:
        """The training data."""
        if self._loader is None:
            raise RuntimeError("ddp_ft makes steps of the training data that `Trainer.fit` has set up, and of no other")
        return self._loader

    def read_from(self, loader: ShardedLoader) -> None:
        """The training data are there."""
        self.close()
        self._loader = loader
        loader.own([self.shard])

    @property
    def index(self) -> int:
        """Of the micro-batch in hand."""
        return self.window[-1]

    def assign(self, assignment: Assignment) -> None:
        """The members have changed."""
        self.assignment = assignment
        self.loader.own([self.shard, *assignment.orphans])

    def fetch(self, epoch: int, index: int) -> None:
        """The loader's next batch is this one, and belongs to the step."""
        self.window.append(index)
        self.loader.seek(epoch, index)

    def end(self) -> None:
        """The step is over."""
        self.window = []

    def close(self) -> None:
        """No more data."""
        if self._loader is not None:
            self._loader.close()
