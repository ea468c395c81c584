"""How long a run may be without a sign of life, learned from the run itself."""

from __future__ import annotations

from collections import deque
from typing import Literal

Kind = Literal["step", "validation", "save", "epoch", "start"]
"""What is going on: a step, a batch of validation, a save; what lies between two epochs; or before and behind all."""

_ENOUGH: dict[Kind, int] = {"step": 3, "validation": 3, "save": 1, "epoch": 1, "start": 1}
_KEPT = 128


class Limits:
    """The limit of each kind: ``seconds``, ``factor`` times its median, or twice its 99th percentile, the longest.

    Until a kind is known it is ``first_seconds``: the first step compiles and the first epoch starts workers; a start
    and an end come once. One thread notes, another may ask.

    Args:
        seconds: the least, > 0.
        factor: of the median, > 1.
        first_seconds: > 0.

    Example:
        >>> limits = Limits(seconds=3, factor=12, first_seconds=600)
        >>> limits.of("step")
        600
        >>> for seconds in (0.5, 0.4, 0.6):
        ...     limits.note("step", seconds)
        >>> limits.of("step")
        6.0
    """

    def __init__(self, seconds: float, factor: float, first_seconds: float) -> None:
        self.seconds = seconds
        self.factor = factor
        self.first_seconds = max(first_seconds, seconds)
        self._taken: dict[Kind, deque[float]] = {kind: deque(maxlen=_KEPT) for kind in _ENOUGH}
        self._floor: dict[Kind, float] = dict.fromkeys(_ENOUGH, seconds)

    def note(self, kind: Kind, seconds: float) -> None:
        """One has taken so long."""
        self._taken[kind].append(seconds)

    def of(self, kind: Kind) -> float:
        """The limit now."""
        taken = sorted(self._taken[kind])
        if len(taken) < _ENOUGH[kind]:
            return self.first_seconds
        middle, high = taken[len(taken) // 2], taken[int(0.99 * (len(taken) - 1))]
        return max(self._floor[kind], self.factor * middle, 2 * high)

    def was_wrong(self, kind: Kind, seconds: float) -> None:
        """What was taken for a hang has gone on after so many seconds: it may take twice as long from now on."""
        self._floor[kind] = max(self._floor[kind], 2 * seconds)
