"""Random numbers from a seed, the epoch and the batch: nothing of them need be kept, and any worker draws the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from lightning_eff.callbacks.exact_resume.generators import Generators
from lightning_eff.training.random_state import seed_host, seed_of


@dataclass
class Seeds:
    """Of one run, on one rank."""

    base: int
    """The same on ranks that were seeded alike, as ``seed_everything`` does."""
    rank: int
    epoch: Callable[[], int]

    def of_batch(self, batch: int) -> int:
        """For what a training step draws."""
        return seed_of(self.base, "batch", self.epoch(), batch)

    def of_order(self, loader: int, epoch: int, times: int) -> int:
        """For what a sampler draws, which ranks may have to agree on."""
        return seed_of(self.base, "order", loader, epoch, times)

    def of_samples(self, loader: int, epoch: int, times: int, seen: int, batch: int, rank: int) -> int:
        """For what is drawn while a batch is loaded; other numbers on each rank."""
        return seed_of(self.base, "samples", loader, epoch, times, seen, batch, rank)


class SeededDataset(Dataset[Any]):
    """Loads the samples of a batch behind a seed, which comes with their indices.

    What collates the batch goes on with the same numbers. In the process of the training somebody else puts the
    generators back.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._generators: Generators | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, Any]) -> Any:
        self._seed(index[0])
        return self.dataset[index[1]]

    def __getitems__(self, indices: tuple[int, list[Any]]) -> Any:
        """A batch."""
        self._seed(indices[0])
        if many := getattr(self.dataset, "__getitems__", None):
            return many(indices[1])
        return [self.dataset[index] for index in indices[1]]

    def _seed(self, seed: int) -> None:
        seed_host(seed)
        if self._generators is None:  # in the process that loads
            self._generators = Generators(dataset=self.dataset)
        self._generators.seed(seed)
