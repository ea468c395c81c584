"""A replica's part of a validation set, by who is alive when the validation begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


class EvaluationShare:
    """A DataLoader whose sampler follows the living replicas; takes its place in the Trainer.

    All of them have the same number of batches, so the last samples may be evaluated twice, as under DDP.

    Args:
        loader: with a ``DistributedSampler``, as Lightning puts it in; any other sampler gives every replica all.
        where: this replica's rank among the living, and how many they are; (0, 1) before the first step.
        fraction: of its batches that a replica evaluates.
    """

    def __init__(self, loader: DataLoader[Any], where: Callable[[], tuple[int, int]], fraction: float = 1.0) -> None:
        self.loader = loader
        self.where = where
        self.fraction = fraction

    @property
    def sampler(self) -> Any:
        """Where Lightning looks for ``set_epoch``."""
        return self.loader.sampler

    @property
    def dataset(self) -> Any:
        """The user's dataset."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch."""
        return self.loader.batch_size

    def __len__(self) -> int:
        """Batches of this replica, as things stand."""
        self._share()
        _, count = self.where()
        # Before the first step Lightning asks for the limit of later validations, which may be of one replica.
        return max(1, int(len(self.loader) * self.fraction)) if count > 1 else len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Over this replica's part."""
        count = len(self)
        return islice(iter(self.loader), count)

    def _share(self) -> None:
        sampler = self.loader.sampler
        if not isinstance(sampler, DistributedSampler):
            return
        sampler.rank, sampler.num_replicas = self.where()
        sampler.num_samples = math.ceil(len(sampler.dataset) / sampler.num_replicas)  # type: ignore[arg-type]
        sampler.total_size = sampler.num_samples * sampler.num_replicas
