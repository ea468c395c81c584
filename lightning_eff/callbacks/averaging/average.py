"""What an average of the weights is: the interface of the window of snapshots and of the exponential averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor


class Average(ABC):
    """Averages named tensors along a run. It knows no Trainer, and of a sharded tensor this rank's part alone.

    One may have several: ``""`` is the main one, and others have a label.
    """

    collected = 0
    """How many times something has been collected; 0: there is no average yet."""

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """The averages that are evaluated."""

    @property
    def saved_labels(self) -> list[str]:
        """And those that have files."""
        return self.labels

    @abstractmethod
    def collect(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Take what the average needs from the tensors, after ``step`` updates; the same dict while they are."""

    @abstractmethod
    def read(self, label: str, tensors: Mapping[str, Tensor], rounded: bool) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's average, on any device; ``rounded``: in the tensor's dtype, where one is made anew anyway."""

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor moves from now on and was the same until now."""

    @abstractmethod
    def follow(self, renamed: Mapping[str, str], gone: Set[str]) -> None:
        """Tensors have new names, by their old ones, and others are there no longer."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything: a new run begins."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What is saved beside a checkpoint, by reference."""

    def held_state(self) -> dict[str, Any]:
        """The same to go back to within the run."""
        return self.state()

    @abstractmethod
    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        """Take a state back; False, and nothing, if it does not fit the tensors."""

    @abstractmethod
    def recover(self, averages: Sequence[Mapping[str, Tensor]], about: Sequence[Mapping[str, Any]]) -> bool:
        """Go on from the averages themselves, of ``saved_labels`` and with what ``about`` said of each."""

    @abstractmethod
    def about(self, label: str) -> dict[str, Any]:
        """What an average is, for its files; plain values."""
