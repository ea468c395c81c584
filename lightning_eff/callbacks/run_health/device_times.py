"""Phases of a step as the device has worked on them: marks in its queue, read when it has long passed them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any


class DeviceTimes:
    """Puts the device's times in place of the host's, which only queues the work.

    The times come some steps late, and in order. Nobody waits: a step whose last mark the device has not reached stays
    where it is, and so do those behind it.

    Args:
        event: makes one that records times, such as ``lambda: torch.cuda.Event(enable_timing=True)``.
    """

    def __init__(self, event: Callable[[], Any]) -> None:
        self._event = event
        self._marks: list[tuple[int, Any]] = []
        self._steps: deque[tuple[list[float], list[tuple[int, Any]]]] = deque()

    def mark(self, phase: int) -> None:
        """What is queued from here on belongs to a phase."""
        event = self._event()
        event.record()
        self._marks.append((phase, event))

    def close(self, times: list[float]) -> None:
        """A step has ended, whose phases have taken so many seconds on the host."""
        self._steps.append((times, self._marks))
        self._marks = []

    def ready(self) -> Iterator[list[float]]:
        """The steps that the device has done since the last call."""
        while self._steps:
            times, marks = self._steps[0]
            if marks and not marks[-1][1].query():
                return
            self._steps.popleft()
            for phase in {phase for phase, _ in marks[:-1]}:
                times[phase] = 0.0
            for (phase, begin), (_, end) in pairwise(marks):
                times[phase] += begin.elapsed_time(end) / 1000
            yield times
