"""Who is slow, and in what: the ranks' times of the same steps, side by side.

In data parallel training every step ends for all ranks at once, so that a slow rank is not the one whose steps are
long, but the one that does not wait. What is compared is the time that a rank is busy: all of its step but waiting,
validation and saving.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from lightning_eff.callbacks.run_health.exchange import Numbers
from lightning_eff.callbacks.run_health.phases import OTHER, PHASES, SAVING, VALIDATION, WAITING

BUSY = [phase for phase in range(len(PHASES)) if phase not in (WAITING, VALIDATION, SAVING)]
_ERRORS = 4.0  # standard errors by which a slow rank has to be slower than half of what is asked for
_MOST = np.log(2)  # of a ratio's logarithm that is believed of one step
_LEAST = 0.002  # seconds; in steps of a millisecond, ranks differ by what Python does beside
_STEPS = 40  # the least that a judgement is made of
_SECONDS = 2.0  # and no less: for so long the system may prefer one process to another where cores are shared
_LEARN = 5  # windows until what the network takes is known

_COUNT = len(PHASES)


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile; NaN of nothing.

    Example:
        >>> quantiles([0.1, 0.3, 0.2])
        (0.2, 0.3)
    """
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return (ordered[last // 2], ordered[round(0.99 * last)]) if ordered else (np.nan, np.nan)


def median_of_known(values: Numbers, axis: int) -> Numbers:
    """The median of what is known; NaN where nothing is. ``np.nanmedian`` takes ten times as long of so few."""
    ordered = np.sort(values, axis=axis)  # NaN last
    known = (~np.isnan(values)).sum(axis, keepdims=True)
    below = np.take_along_axis(ordered, np.maximum(known - 1, 0) // 2, axis)
    return (below + np.take_along_axis(ordered, np.minimum(known // 2, values.shape[axis] - 1), axis)) / 2


def surely_above(ratios: Numbers, least: float) -> bool:
    """Whether these ratios of consecutive steps are above ``least`` by four standard errors of their mean.

    On a busy machine they scatter, and what disturbs one step disturbs the next one too, so that many steps say less
    than they would otherwise: the error grows by their autocorrelation. No single step counts for more than a double.

    Example:
        >>> surely_above(np.array([1.2, 1.1] * 20), 1.05), surely_above(np.array([1.6, 0.8] * 20), 1.05)
        (True, False)
    """
    logs = np.clip(np.log(ratios[~np.isnan(ratios)]), -_MOST, _MOST)
    if len(logs) < 0.8 * len(ratios):
        return False
    away = logs - logs.mean()
    variance = max(float((away**2).mean()), 1e-12)
    alike = min(max(float((away[1:] * away[:-1]).mean()) / variance, 0.0), 0.9)
    error = np.sqrt(variance / len(logs) * (1 + alike) / (1 - alike))
    return bool(logs.mean() - np.log(least) > _ERRORS * error)


def summary(steps: Sequence[Sequence[float]], every: int, worst_callback: int, extra: Sequence[float]) -> Numbers:
    """What a rank tells the others of its last ``every`` steps, as one vector.

    Medians of the phases, their 99th percentiles, the seconds that it was busy in each step, which callback takes most,
    and ``extra``. A step that is not known yet is NaN.
    """
    columns = [quantiles([step[phase] for step in steps]) for phase in range(_COUNT)]
    busy = [sum(step[phase] for phase in BUSY) for step in steps]
    unknown = [np.nan] * (every - len(busy))
    told = [*(middle for middle, _ in columns), *(high for _, high in columns), *unknown, *busy, worst_callback, *extra]
    return np.array(told, dtype=np.float64)


@dataclass(frozen=True)
class Window:
    """What the ranks have told, a row for each.

    Attributes:
        medians: of the phases, seconds, (ranks, phases).
        p99: (ranks, phases).
        busy: seconds in each step, (ranks, steps).
        worst_callback: index of the one that takes most, (ranks,).
        extra: what was told beside.
    """

    medians: Numbers
    p99: Numbers
    busy: Numbers
    worst_callback: list[int]
    extra: Numbers

    @classmethod
    def of(cls, told: Numbers, every: int) -> Window:
        """Take apart what `summary` has put together."""
        ends = np.cumsum([_COUNT, _COUNT, every, 1])
        medians, p99, busy, worst, extra = np.split(told, ends, axis=1)
        return cls(medians, p99, busy, [int(index) for index in worst[:, 0]], extra)


@dataclass(frozen=True)
class Finding:
    """What is slow.

    Attributes:
        rank: who; None for the network between the ranks.
        phase: in which of ``PHASES`` it loses most.
        slower: by which share of a step of the others, 0.2 for a fifth.
        callback: index of the callback that takes most there, where the phase is ``callbacks``.
    """

    rank: int | None
    phase: str
    slower: float
    callback: int | None = None


class Stragglers:
    """Judges window after window.

    A rank is slow if over the last ``patience`` windows, or as many as make 40 steps and 2 s, it was in the median step
    by ``slow`` busier than the others, and by half of that in the mean for sure: by four standard errors, as these
    steps scatter. The network is slow if in each of the windows even the rank that comes last waits twice as long as
    it used to, longer than in nineteen of twenty before, and by ``slow`` of a step.

    Args:
        slow: the share of a step, > 0.
        patience: windows, >= 1.
    """

    def __init__(self, slow: float, patience: int) -> None:
        self.slow = slow
        self.patience = patience
        self.network = 0.0
        """Seconds of a step that even the last rank waits."""
        self._ratios: deque[Numbers] = deque()  # of the windows that are judged together
        self._seconds: deque[float] = deque()  # that each of them took
        self._waits: deque[float] = deque(maxlen=50)

    def judge(self, window: Window) -> Finding | None:
        """What is slow after one window more; needs two ranks."""
        busy, medians = window.busy, window.medians
        ranks, steps = busy.shape
        if ranks < 2 or np.isnan(medians).any():
            return None
        # With two ranks each is compared to the other; of several, one moves their median little.
        usual, usual_medians = (
            (busy[::-1], medians[::-1]) if ranks == 2 else (median_of_known(busy, 0), median_of_known(medians, 0))
        )
        windows = max(self.patience, -(-_STEPS // steps))
        self._ratios.append(busy / usual)
        self._seconds.append(steps * float(np.median(medians[:, : OTHER + 1].sum(1))))
        self.network = float(medians[:, WAITING].min())
        slow_network = self._slow_network(medians, windows)
        self._waits.append(self.network)
        if len(self._ratios) < windows or sum(self._seconds) < _SECONDS:
            return None
        while len(self._ratios) > windows and sum(self._seconds) - self._seconds[0] >= _SECONDS:
            self._ratios.popleft()
            self._seconds.popleft()
        ratios = np.concatenate(self._ratios, axis=1)
        middle = median_of_known(ratios, 1)[:, 0]
        lost = (medians - usual_medians)[:, BUSY]
        slow = (middle >= 1 + self.slow) & (lost.sum(1) >= _LEAST)
        for suspect in np.flatnonzero(slow):
            slow[suspect] = surely_above(ratios[suspect], 1 + self.slow / 2)
        if not slow.any():
            return slow_network
        rank = int(np.where(slow, middle, 0.0).argmax())
        phase = BUSY[int(lost[rank].argmax())]
        callback = window.worst_callback[rank] if PHASES[phase] == "callbacks" else None
        return Finding(rank, PHASES[phase], float(middle[rank]) - 1, callback)

    def _slow_network(self, medians: Numbers, windows: int) -> Finding | None:
        """From the windows before, this one being the last of so many."""
        waits = [*self._waits, self.network]
        before, now = waits[:-windows], waits[-windows:]
        if len(before) < _LEARN:
            return None
        usual, often = median(before), sorted(before)[int(0.95 * len(before))]
        if min(now) < 2 * usual or min(now) <= often or min(now) - usual < _LEAST:
            return None
        slower = (min(now) - usual) / max(float(np.median(medians[:, : OTHER + 1].sum(1))), 1e-9)
        return None if slower < self.slow else Finding(None, "waiting", slower)
