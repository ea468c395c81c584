"""What one TensorBoard logger is given: which numbers move, and copies of some in runs of their own."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_eff.callbacks.tensorboard_layout.charts import COPIED, draws, prefix_of
from lightning_eff.training.wrapping import Wrapper

_SETTLED = 3  # times that a number has to be the same before its chart counts as flat


def writes_now() -> bool:
    """Whether loggers write here; with ``ddp_ft`` another replica may do so by now."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


class Listener:
    """Stands in front of a logger's ``log_metrics`` until it leaves; the values are on the host there already.

    TensorBoard gives every run one colour, and all curves of a run have it. A curve that is to have its own is copied,
    point by point, to a run below the logger's.

    Args:
        logger: on the rank that writes.
        copied: for each run below the logger's the patterns of the tags that it gets.
        seen: what a run that is gone on from has seen, ``{tag: [times, first value or None if it has moved]}``.
    """

    def __init__(self, logger: TensorBoardLogger, copied: Mapping[str, list[str]], seen: Mapping[str, Any]) -> None:
        self.logger = logger
        self.copied = copied
        self.seen: dict[str, list[Any]] = {tag: list(known) for tag, known in seen.items()}
        self._writers: dict[str, Any] = {}
        self._wrapper = Wrapper(logger, "log_metrics", self._hear)

    def _hear(self, log_metrics: Any, metrics: dict[str, Any], step: int | None = None) -> None:
        log_metrics(metrics, step)
        for tag, value in metrics.items():
            if not isinstance(value, int | float):
                continue  # a dict of several scalars, which Lightning lets pass
            known = self.seen.setdefault(tag, [0, float(value)])
            known[0] = min(known[0] + 1, _SETTLED)
            if known[1] != value and not (math.isnan(value) and known[1] is not None and math.isnan(known[1])):
                known[1] = None
            for run, patterns in self.copied.items():
                if any(re.fullmatch(pattern, tag) for pattern in patterns):
                    self._copy(run, tag, value, step)

    def _copy(self, run: str, tag: str, value: float, step: int | None) -> None:
        if not writes_now():
            return
        if run not in self._writers:
            kind = type(self.logger.experiment)
            self._writers[run] = kind(log_dir=os.path.join(self.logger.log_dir, run))
        self._writers[run].add_scalar(f"{COPIED}{prefix_of(self.logger)}{tag}", value, step)
        self._writers[run].flush()  # a validation's few numbers, which TensorBoard is to see now

    def is_flat(self, chart: list[Any]) -> bool:
        """Whether a chart has had time to show something and has not: its tags stand still, or were never logged."""
        if all(times < _SETTLED for times, _ in self.seen.values()):
            return False
        drawn = [known for tag, known in self.seen.items() if draws(chart, tag)]
        settled = not drawn or any(times >= _SETTLED for times, _ in drawn)
        return settled and all(first is not None for _, first in drawn)

    def leave(self) -> None:
        """Close the runs below, and leave the logger as it was."""
        self._wrapper.remove()
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
