"""What averaging costs where a step is Python's work: ``python -m benchmarks.checkpoint_averaging small``."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from benchmarks.rows import CONSOLE, show, write_rows
from harness.runs import QUIET
from lightning_eff.callbacks import EMA, CheckpointAveraging

_WARM_UP = 5  # pairs of steps

SMALL: dict[str, Callable[[], L.Callback]] = {
    "EMA, every step": lambda: EMA(0.999),
    "CheckpointAveraging, every step": lambda: CheckpointAveraging(window=4, every_n_steps=1),
}


class Small(L.LightningModule):
    """A thousand matrices of 4 x 4, whose step is the work of Python and hardly of arithmetic."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(tensors)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


class EveryOther(L.Callback):
    """Has another callback work in every second step, and takes the CPU time of each: a slow moment hits both alike."""

    def __init__(self, callback: L.Callback) -> None:
        self.callback = callback
        self.marks: list[float] = []

    def setup(self, *arguments: Any, **named: Any) -> None:
        self.callback.setup(*arguments, **named)

    def on_fit_start(self, *arguments: Any) -> None:
        self.callback.on_fit_start(*arguments)

    def on_train_start(self, *arguments: Any) -> None:
        self.callback.on_train_start(*arguments)

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.process_time())

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        if len(self.marks) % 2 == 0:
            self.callback.on_before_optimizer_step(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        if len(self.marks) % 2 == 0:
            self.callback.on_train_batch_end(*arguments)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Seconds of a step with the callback and of the one before it, without."""
        steps = [b - a for a, b in itertools.pairwise(self.marks)][2 * _WARM_UP :]
        return list(zip(steps[1::2], steps[::2], strict=False))


def many_small_tensors(rounds: int, tensors: int, tiny: bool) -> None:
    """CPU time of a step with each callback over that without, on one thread."""
    torch.set_num_threads(1)
    steps = 2 * _WARM_UP + (10 if tiny else 80)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in SMALL}
    for name in [*SMALL] * rounds:
        times = EveryOther(SMALL[name]())
        data = torch.utils.data.DataLoader(torch.randn(4 * steps, 4), batch_size=4)
        L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[times], **QUIET).fit(Small(tensors), data)
        pairs[name] += times.pairs
    rows = []
    for name, measured in pairs.items():
        low, middle, high = statistics.quantiles((with_ / without for with_, without in measured), n=4)
        row: dict[str, Any] = {"tensors": tensors, "shape": "4 x 4", "callback": name, "pairs_of_steps": len(measured)}
        row["step_cpu_ms"] = round(statistics.median(without for _, without in measured) * 1e3, 2)
        rows.append(row | {"over_none": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)})
    show("Many small tensors: CPU time of a step", rows)
    if not tiny:
        CONSOLE.print(write_rows("checkpoint_averaging_small", rows))
