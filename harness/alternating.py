"""What a callback costs in each step, measured within one run: blocks of steps with it and without it, in turn.

Two runs of the same training differ by some per cent of a step, in memory layout and by what the machine does
meanwhile. Within one run the same processes do the same work a second later, so that much smaller differences show.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from typing_extensions import override

COLUMNS = ["rounds", "cpu_ms_a_step", "cpu_us_more", "cpu_ratio", "cpu_ratio_low", "cpu_ratio_high"]
"""Those of `cost_row` that say most."""


class Alternating(L.Callback):
    """Times blocks of steps, each under another `arm`; pass it as the last callback.

    The arms come once a round, in an order that rotates, on all ranks alike. What is done to go from one to the next
    is not timed.

    Args:
        arms: by name, what is to be done in the Trainer so that the steps from here on are of that arm. The run begins
            with the first one, for which nothing is done at first.
        block: steps in a row under one arm; a multiple of the period of what does something every n steps.
        warm: steps before the first block, under the first arm.
    """

    def __init__(self, arms: Mapping[str, Callable[[L.Trainer], None]], block: int, warm: int) -> None:
        self.arms = arms
        self.block = block
        self.warm = warm
        self._cpu: dict[str, list[float]] = {name: [] for name in arms}
        self._wall: dict[str, list[float]] = {name: [] for name in arms}
        self._steps = 0
        self.arm = next(iter(arms))
        self._since = (0.0, 0.0)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self._steps += 1
        blocks, within = divmod(self._steps - self.warm, self.block)
        if blocks < 0 or within:
            return
        if blocks:
            self._cpu[self.arm].append((cpu - self._since[0]) / self.block)
            self._wall[self.arm].append((wall - self._since[1]) / self.block)
        names = list(self.arms)
        turn, place = divmod(blocks, len(names))
        self._enter(trainer, names[(turn + place) % len(names)])

    def _enter(self, trainer: L.Trainer, arm: str) -> None:
        if arm != self.arm:
            self.arm = arm
            self.arms[arm](trainer)
        self._since = time.process_time(), time.perf_counter()

    def figures(self) -> dict[str, dict[str, list[float]]]:
        """By ``"cpu"`` and ``"wall"`` and by arm, seconds of a step in each block, of the rounds that are complete.

        CPU time is of this process, in all its threads.
        """
        rounds = min(len(values) for values in self._cpu.values())
        return {
            kind: {arm: values[:rounds] for arm, values in figures.items()}
            for kind, figures in (("cpu", self._cpu), ("wall", self._wall))
        }


def median_within(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median, and between which two of the values that of many more lies with this confidence.

    Whatever they are distributed like: half of them lie below it, as coins fall.

    Example:
        >>> median_within([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0])
        (4.5, 1.0, 8.0)
    """
    ordered, n = sorted(values), len(values)
    outside, beyond = 0.0, 0  # so many at each end can be left out
    while beyond < n // 2:
        outside += 2 * math.comb(n, beyond) / 2**n
        if outside > 1 - confidence:
            break
        beyond += 1
    at = max(beyond - 1, 0)
    return statistics.median(ordered), ordered[at], ordered[n - 1 - at]


def cost_row(ranks: Sequence[Mapping[str, Any]], of: str, to: str) -> dict[str, float]:
    """What an arm costs beside another, from the ``figures`` of all ranks, as columns of a row.

    Medians over the rounds of the mean over the ranks, and their 95 % intervals.
    """
    (cpu, cpu_to), (wall, wall_to) = ((_mean(ranks, kind, of), _mean(ranks, kind, to)) for kind in ("cpu", "wall"))
    return {
        "rounds": len(cpu),
        "cpu_ms_a_step": round(1000 * statistics.median(cpu_to), 3),
        **_columns("cpu_us_more", [1e6 * (a - b) for a, b in zip(cpu, cpu_to, strict=True)], 1),
        **_columns("cpu_ratio", [a / b for a, b in zip(cpu, cpu_to, strict=True)], 4),
        **_columns("wall_ratio", [a / b for a, b in zip(wall, wall_to, strict=True)], 4),
    }


def _mean(ranks: Sequence[Mapping[str, Any]], kind: str, arm: str) -> list[float]:
    return [statistics.fmean(each) for each in zip(*(rank[kind][arm] for rank in ranks), strict=True)]


def _columns(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    middle, low, high = (round(value, digits) for value in median_within(values))
    return {name: middle, f"{name}_low": low, f"{name}_high": high}
