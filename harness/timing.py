"""Times: of a call, of every step of a run, and of variants side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import numpy
import torch
from typing_extensions import override


def now() -> float:
    """Seconds on a clock that runs on, after all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = now()
    call()
    return now() - start


def seconds_of_a_copy(size: int, times: int = 7, before: Callable[[], Any] = lambda: None) -> float:
    """How long so many bytes of host memory take into memory that has been used: the median, and what a machine allows.

    ``before`` is called in front of each copy and not measured.
    """
    source, copy = torch.ones(size, dtype=torch.uint8).numpy(), torch.zeros(size, dtype=torch.uint8).numpy()
    seconds = []
    for _ in range(times):
        before()
        seconds.append(seconds_of(partial(numpy.copyto, copy, source)))
    return statistics.median(seconds)


class StepTimes(L.Callback):
    """Seconds of every step, from one batch's start to the next one's, without the first ``warmup`` steps."""

    def __init__(self, warmup: int = 1) -> None:
        self.warmup = warmup
        self._marks: list[float] = []

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._marks.append(now())

    on_train_end = on_train_batch_start

    @property
    def seconds(self) -> list[float]:
        """One number a step."""
        return [b - a for a, b in itertools.pairwise(self._marks[self.warmup :])]

    @property
    def median(self) -> float:
        """What most steps take."""
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        """What a step costs where some of them do more than others."""
        return statistics.fmean(self.seconds)


def in_turn(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every variant once a round, in an order that rotates, so that a slow moment hits them all alike."""
    names = list(variants)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            figures[name].append(variants[name]())
    return figures


def ratio(figures: Mapping[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the ratios round by round."""
    ratios = [a / b for a, b in zip(figures[of], figures[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def over(figures: Mapping[str, list[float]], of: str, to: str, column: str, digits: int = 4) -> dict[str, float]:
    """The `ratio` as columns of a row: ``column``, and the quartiles behind it as ``column_q1`` and ``column_q3``."""
    middle, low, high = (round(value, digits) for value in ratio(figures, of, to))
    return {column: middle, f"{column}_q1": low, f"{column}_q3": high}


def add_time_of(target: Any, method: str, *seconds: tuple[list[float], Callable[[], float]]) -> None:
    """What a method takes from now on is added to the last entry of each list, by the clock that goes with it."""
    inner = getattr(target, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = [clock() for _, clock in seconds]
        result = inner(*args, **kwargs)
        for (entries, clock), before in zip(seconds, begun, strict=True):
            if entries:
                entries[-1] += clock() - before
        return result

    setattr(target, method, timed)
