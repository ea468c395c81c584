"""Exponential and power-function averages, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_eff.callbacks.averaging.average import Average
from lightning_eff.functional.ema import Shadows, power_decay, power_from_width, warmup_decay


class ExponentialAverage(Average):
    """Average of all that has been, in one copy for each width.

    The arguments are those of :class:`~lightning_eff.callbacks.EMA`.

    Example:
        >>> import torch
        >>> average = ExponentialAverage(decay=0.5, warmup=False)
        >>> for step in (1, 2):
        ...     average.collect(step, {"weight": torch.full((2,), float(step))})
        >>> dict(average.read("", {"weight": torch.zeros(2)}, rounded=True))
        {'weight': tensor([1.5000, 1.5000])}
    """

    def __init__(
        self,
        decay: float,
        widths: Sequence[float] = (),
        warmup: bool = True,
        storage: Literal["model", "cpu"] = "model",
    ) -> None:
        self.decay = decay
        self.widths = list(widths)
        self.warmup = warmup
        self.storage = storage
        self.collected = 0
        self._last_step = 0
        self._names: list[str] = []
        self._shadows: list[Shadows] = []  # for each width, in the order of names
        self._seen: tuple[dict[str, Tensor], list[list[Tensor]]] | None = None  # what was collected, sorted

    @property
    @override
    def labels(self) -> list[str]:
        return ["", *map(str, self.widths[1:])]

    @override
    def collect(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.collected += 1
        since, self._last_step = step - self._last_step, step
        if not self._names:
            self._names = list(tensors)
            self._shadows = [Shadows(tensors.values(), self._device) for _ in self.widths or (None,)]
            return
        if self.widths:
            decays = [power_decay(step, power_from_width(width), since) for width in self.widths]
        else:
            decays = [warmup_decay(self.collected, self.decay) if self.warmup else self.decay]
        if self._seen is None or self._seen[0] is not tensors:
            self._seen = (tensors, self._shadows[0].sort([tensors[name] for name in self._names]))
        for shadows, decay in zip(self._shadows, decays, strict=True):
            shadows.update(self._seen[1], decay)

    @property
    def _device(self) -> str | None:
        return "cpu" if self.storage == "cpu" else None

    @override
    def read(self, label: str, tensors: Mapping[str, Tensor], rounded: bool) -> Iterator[tuple[str, Tensor]]:
        for name, shadow in zip(self._names, self._shadows[self.labels.index(label)].tensors, strict=True):
            if name in tensors:
                yield name, shadow

    @override
    def add(self, name: str, tensor: Tensor) -> None:
        if self._names and name not in self._names:
            self._names.append(name)
            for shadows in self._shadows:
                shadows.append(tensor, self._device)
            self._seen = None

    @override
    def follow(self, renamed: Mapping[str, str], gone: Set[str]) -> None:
        if not gone.isdisjoint(self._names):
            kept = [index for index, name in enumerate(self._names) if name not in gone]
            self._names = [self._names[index] for index in kept]
            self._shadows = [Shadows([old.tensors[index] for index in kept], self._device) for old in self._shadows]
        self._names = [renamed.get(name, name) for name in self._names]
        self._seen = None

    @override
    def reset(self) -> None:
        self._names, self._shadows, self._seen = [], [], None
        self.collected = self._last_step = 0

    @override
    def state(self) -> dict[str, Any]:
        averages = [dict(zip(self._names, shadows.tensors, strict=True)) for shadows in self._shadows]
        return {"averages": averages, "widths": self.widths, "updated": self.collected, "last_step": self._last_step}

    @override
    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        self.reset()
        averages: list[dict[str, Tensor]] = state["averages"]
        named = averages[0] if averages else {}
        fits = all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in named.items())
        if not fits or state["widths"] != self.widths:
            return False
        self._names = list(named)
        like = [tensors[name] for name in self._names]
        for average in averages:
            shadows = Shadows(like, self._device)
            for shadow, saved in zip(shadows.tensors, average.values(), strict=True):
                shadow.copy_(saved)
            self._shadows.append(shadows)
        self.collected, self._last_step = state["updated"], state["last_step"]
        return True

    @override
    def recover(self, averages: Sequence[Mapping[str, Tensor]], about: Sequence[Mapping[str, Any]]) -> bool:
        """Nothing is lost: the files have the whole average."""
        self.reset()
        if self.widths and [of_one["sigma_rel"] for of_one in about] != self.widths:
            return False
        if about[0]["updates"] == 0:  # the files have the live weights
            return True
        self._names = list(averages[0])
        self._shadows = [Shadows((average[name] for name in self._names), self._device) for average in averages]
        self.collected, self._last_step = about[0]["updates"], about[0]["last_step"]
        return True

    @override
    def about(self, label: str) -> dict[str, Any]:
        kind: dict[str, Any] = {"scheme": "exponential", "decay": self.decay}
        if self.widths:
            kind = {"scheme": "power", "sigma_rel": self.widths[self.labels.index(label)]}
        return {**kind, "updates": self.collected, "last_step": self._last_step}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None}  # the model's own memory
