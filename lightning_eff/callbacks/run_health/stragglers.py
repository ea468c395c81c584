"""Who is slow, and in what: the ranks' times of the same steps, side by side.

In data parallel training every step ends for all ranks at once, so that a slow rank is not the one whose steps are
long, but the one that does not wait. What is compared is the time that a rank is busy: all of its step but waiting,
validation and saving, and what the system gave to other work meanwhile. That is looked at too, over a longer time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np

from lightning_eff.callbacks.run_health.exchange import Numbers
from lightning_eff.callbacks.run_health.phases import DATA, OTHER, PHASES, SAVING, VALIDATION, WAITING

BUSY = [phase for phase in range(len(PHASES)) if phase not in (WAITING, VALIDATION, SAVING)]
_ERRORS = 4.0  # standard errors by which a slow rank has to be slower than half of what is asked for
_MOST = np.log(2)  # of a ratio's logarithm that is believed of one step
_LEAST = 0.002  # seconds; in steps of a millisecond, ranks differ by what Python does beside
_STEPS = 40  # the least that a judgement is made of
_SECONDS = 5.0  # and no less: a core whose parts others use, too, may be slower by half for three of them
_PARTS = 4  # of the time that is judged: in each of them
_LONGER = 10  # times as much of both, where what it gave to other work counts
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


def median_of_known(values: Numbers) -> Numbers:
    """Of each row the median of what is known; NaN of nothing. ``np.nanmedian`` takes ten times as long of so few."""
    ordered = np.sort(values, axis=1)  # NaN last
    known, rows = (~np.isnan(values)).sum(1), np.arange(len(values))
    below, above = np.maximum(known - 1, 0) // 2, np.minimum(known // 2, values.shape[1] - 1)
    middle: Numbers = (ordered[rows, below] + ordered[rows, above]) / 2
    return middle


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


def summary(
    steps: Sequence[Sequence[float]],
    every: int,
    delays: Sequence[float],
    worst_callback: int,
    extra: Sequence[float],
) -> Numbers:
    """What a rank tells the others of its last ``every`` steps, as one vector.

    Medians of the phases, their 99th percentiles, the seconds that it was busy in each step, without those in which it
    got no core, the mean of these, which callback takes most, and ``extra``. A step that is not known yet is NaN.
    """
    told = [quantiles(column) for column in islice(zip(*steps, strict=False), _COUNT)] or [quantiles(())] * _COUNT
    unknown = [np.nan] * (every - len(steps))
    busy = [sum(step[:_COUNT]) - step[WAITING] - step[VALIDATION] - step[SAVING] for step in steps]
    for number, delayed in enumerate(delays, len(busy) - len(delays)):
        busy[number] = max(busy[number] - delayed, busy[number] / 10)  # some of it may lie where the rank waits
    delay = sum(delays) / max(len(delays), 1)
    middle, high = zip(*told, strict=True)
    return np.array([*middle, *high, *unknown, *busy, delay, worst_callback, *extra])


@dataclass(frozen=True)
class Window:
    """What the ranks have told, a row for each.

    Attributes:
        medians: of the phases, seconds, (ranks, phases).
        p99: (ranks, phases).
        busy: seconds in each step, (ranks, steps).
        delay: seconds of a step beside these in which it got no core, (ranks,).
        worst_callback: index of the one that takes most, (ranks,).
        extra: what was told beside.
    """

    medians: Numbers
    p99: Numbers
    busy: Numbers
    delay: Numbers
    worst_callback: list[int]
    extra: Numbers

    @classmethod
    def of(cls, told: Numbers, every: int) -> Window:
        """Take apart what `summary` has put together."""
        end = 2 * _COUNT + every
        worst = [int(index) for index in told[:, end + 1]]
        medians, p99, busy = told[:, :_COUNT], told[:, _COUNT : 2 * _COUNT], told[:, 2 * _COUNT : end]
        return cls(medians, p99, busy, told[:, end], worst, told[:, end + 2 :])

    def values(self) -> dict[str, float]:
        """What is logged: the seconds of a step, and shares of it."""
        middle, busy = np.median(self.medians, axis=0), np.median(self.busy, axis=1)
        step = float(middle[: OTHER + 1].sum()) or 1e-9
        return {
            "step_seconds": step,
            "data": float(middle[DATA]) / step,
            "waiting": float(middle[WAITING]) / step,
            "spread": float(busy.max() / max(float(np.median(busy)), 1e-9)) - 1,
        }


@dataclass(frozen=True)
class Finding:
    """What is slow.

    Attributes:
        rank: who; None for the network between the ranks.
        phase: in which of ``PHASES`` it loses most.
        slower: by which share of a step of the others, 0.2 for a fifth.
        callback: index of the callback that takes most there, where the phase is ``callbacks``.
        crowded: whether it is so only with what its machine's system gave to other work.
    """

    rank: int | None
    phase: str
    slower: float
    callback: int | None = None
    crowded: bool = False


class _Together:
    """How busy each rank was, in as many of the latest windows as are judged together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._busy: deque[Numbers] = deque()
        self._took: deque[float] = deque()  # seconds, each window

    def add(self, busy: Numbers, took: float, windows: int) -> None:
        """One window more, (ranks, steps)."""
        self._busy.append(busy)
        self._took.append(took)
        while len(self._busy) > windows and sum(self._took) - self._took[0] >= self.seconds:
            self._busy.popleft()
            self._took.popleft()

    def __len__(self) -> int:
        return len(self._busy)

    def ratios(self, windows: int) -> Numbers | None:
        """Over what is usual, (ranks, steps); None as long as there are too few windows, or too short ones."""
        if len(self._busy) < windows or sum(self._took) < self.seconds:
            return None
        busy = np.concatenate(self._busy, axis=1)
        return busy / _usual(busy)


class Stragglers:
    """Judges window after window.

    A rank is slow if over the last ``patience`` windows, or as many as make 40 steps and 5 s, it was in the median step
    by ``slow`` busier than the others; by half of that in each quarter of them; and by half of that in the mean for
    sure: by four standard errors, as these steps scatter. With the time in which it got no core it has to be so over
    the means of ten times as many windows, and 50 s. The network is slow if in all of the windows even the rank that
    comes last waits twice as long as it used to, longer than in nineteen of twenty before, and by ``slow`` of a step.

    Args:
        slow: the share of a step, > 0.
        patience: windows, >= 1.
    """

    def __init__(self, slow: float, patience: int) -> None:
        self.slow = slow
        self.patience = patience
        self.network = 0.0
        """Seconds of a step that even the last rank waits."""
        self.suspects = 0
        """For so many windows more somebody is looked at, as a rank was slower in the last ones. The others know what
        the system gives to other work from then on: to ask it in each step has its price."""
        self._own = _Together(_SECONDS)
        self._crowded = _Together(_LONGER * _SECONDS)
        self._waits: deque[float] = deque(maxlen=200)

    def judge(self, window: Window) -> Finding | None:
        """What is slow after one window more; needs two ranks."""
        busy, medians = window.busy, window.medians
        ranks, steps = busy.shape
        if ranks < 2 or np.isnan(medians).any():
            return None
        windows = max(self.patience, -(-_STEPS // steps))
        took = steps * float(medians[:, : OTHER + 1].sum()) / ranks
        with_delay = (busy.sum(1) / steps + window.delay)[:, None]
        self._own.add(busy, took, windows)
        self._crowded.add(with_delay, took, _LONGER * windows)
        self.network = float(medians[:, WAITING].min())
        slow_network = self._slow_network(medians, len(self._own))
        self._waits.append(self.network)
        # Who is slow over some windows is so in one of them.
        calm = bool((with_delay < (1 + self.slow / 2) * _usual(with_delay)).all())
        self.suspects = max(self.suspects - 1, 0) if calm else windows
        if not self.suspects:
            return slow_network
        own, crowded = self._own.ratios(windows), self._crowded.ratios(_LONGER * windows)
        return self._slowest(own, busy, window) or self._slowest(crowded, with_delay, window, True) or slow_network

    def _slowest(self, ratios: Numbers | None, busy: Numbers, window: Window, crowded: bool = False) -> Finding | None:
        """The rank that is slower than the others by most, if any is."""
        if ratios is None:
            return None
        middle = median_of_known(ratios)
        slow = middle >= 1 + self.slow
        if not slow.any():
            return None
        slow &= (1 - 1 / middle) * median_of_known(busy) >= _LEAST
        for part in np.array_split(ratios, _PARTS, axis=1):
            slow &= median_of_known(part) >= 1 + self.slow / 2
        for suspect in np.flatnonzero(slow):
            slow[suspect] = surely_above(ratios[suspect], 1 + self.slow / 2)
        if not slow.any():
            return None
        rank = int(np.where(slow, middle, 0.0).argmax())
        lost = (window.medians - _usual(window.medians))[rank, BUSY]
        phase = BUSY[int(lost.argmax())]
        callback = window.worst_callback[rank] if PHASES[phase] == "callbacks" else None
        return Finding(rank, PHASES[phase], float(middle[rank]) - 1, callback, crowded)

    def _slow_network(self, medians: Numbers, windows: int) -> Finding | None:
        """From the windows before, this one being the last of so many."""
        waits = [*self._waits, self.network]
        before, now = waits[:-windows], waits[-windows:]
        if len(before) < _LEARN:  # which there are only behind those that are judged
            return None
        usual, least = median(before), min(now)
        if least < 2 * usual or least - usual < _LEAST or least <= sorted(before)[int(0.95 * len(before))]:
            return None
        slower = (least - usual) / max(float(np.median(medians[:, : OTHER + 1].sum(1))), 1e-9)
        return None if slower < self.slow else Finding(None, "waiting", slower)


def _usual(values: Numbers) -> Numbers:
    """What each rank's are compared to: with two ranks the other's; of several, one moves their median little."""
    return values[::-1] if len(values) == 2 else median_of_known(values.T)
