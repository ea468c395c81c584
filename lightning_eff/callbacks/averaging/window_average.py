"""The average of the last snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_eff.callbacks.averaging.average import Average
from lightning_eff.functional.averaging import Curve, scheme_weights, weighted_average
from lightning_eff.training.snapshots import HeldWindow, Place, SnapshotWindow

WindowScheme = Literal["uniform", "linear", "exponential", "wsm", "step"]


class WindowAverage(Average):
    """Average of a sliding window of snapshots.

    The arguments are those of :class:`~lightning_eff.callbacks.CheckpointAveraging`.

    Example:
        >>> average = WindowAverage("linear", 2)
        >>> for step in (1, 2, 3):
        ...     average.collect(step, {"weight": torch.full((2,), float(step))})
        >>> dict(average.read("", {"weight": torch.zeros(2)}, rounded=True))
        {'weight': tensor([2.6667, 2.6667])}
    """

    def __init__(
        self,
        scheme: WindowScheme,
        length: int,
        storage: Place = "cpu",
        decay: Curve = "1-sqrt",
        alpha: float = 0.2,
        penalty: float = 1.0,
        preview: Sequence[int] = (),
    ) -> None:
        self.scheme: WindowScheme = scheme
        self.decay: Curve = decay
        self.alpha = alpha
        self.penalty = penalty
        self.preview = list(preview)
        self.window = SnapshotWindow(length, storage)
        self.collected = 0

    def weights(self, last: int | None = None) -> list[float]:
        """The weights of the ``last`` snapshots now (of all, without it), oldest first; empty without any."""
        steps = self.window.steps[-last:] if last else self.window.steps
        if not steps:
            return []
        return scheme_weights(self.scheme, steps, alpha=self.alpha, decay=self.decay, penalty=self.penalty)

    @property
    @override
    def labels(self) -> list[str]:
        return ["", *map(str, self.preview)]

    @property
    @override
    def saved_labels(self) -> list[str]:
        return [""]

    @override
    def collect(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.window.take(step, tensors)
        self.collected += 1

    @override
    def read(self, label: str, tensors: Mapping[str, Tensor], rounded: bool) -> Iterator[tuple[str, Tensor]]:
        weights = self.weights(int(label) if label else None)
        snapshots = self.window.read()[-len(weights) :]
        for name, tensor in tensors.items():
            if all(name in snapshot for snapshot in snapshots):
                dtype = tensor.dtype if rounded else torch.promote_types(tensor.dtype, torch.float32)
                yield name, weighted_average((snapshot[name] for snapshot in snapshots), weights, dtype)

    @override
    def add(self, name: str, tensor: Tensor) -> None:
        if not any(name in snapshot for snapshot in self.window.read()):
            self.window.add(name, tensor)

    @override
    def follow(self, renamed: Mapping[str, str], gone: Set[str]) -> None:
        self.window.rename(renamed, gone)

    @override
    def reset(self) -> None:
        self.window.clear()
        self.collected = 0

    @override
    def state(self) -> dict[str, Any]:
        return {**self.window.state_dict(), "collected": self.collected}

    @override
    def held_state(self) -> dict[str, Any]:
        return {"held": self.window.hold(), "collected": self.collected}  # copies of copies are not needed

    @override
    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        held = state.get("held")
        if isinstance(held, HeldWindow):
            self.window.go_back(held)
            self.collected = state["collected"]
            return True
        fits = self.window.load_state_dict(held or state, tensors)  # a peer's comes as tensors
        self.collected = state["collected"] if fits else 0
        return fits

    @override
    def recover(self, averages: Sequence[Mapping[str, Tensor]], about: Sequence[Mapping[str, Any]]) -> bool:
        """The average stands for each snapshot that is lost: it is itself for now, and slides out as they would."""
        self.reset()
        for step in about[0]["steps"][-self.window.length :]:
            self.window.take(step, {})
        for name, tensor in averages[0].items():
            self.window.add(name, tensor)
        self.collected = len(self.window.steps)
        return True

    @override
    def about(self, label: str) -> dict[str, Any]:
        about: dict[str, Any] = {"scheme": self.scheme, "steps": list(self.window.steps), "weights": self.weights()}
        return about | ({"decay": self.decay} if self.scheme == "wsm" else {})
