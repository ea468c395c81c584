"""Python's work in a step of each callback: a thousand tensors of 4 x 4.

    python -m benchmarks.many_tensors                  # all, five rounds in turn
    python -m benchmarks.many_tensors --only ZClip EMA

A step of such a model is Python and operator calls, and no arithmetic. CPU time of the whole process, one thread.
Rows go to benchmarks/results/many_tensors.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from benchmarks.rows import CONSOLE, show, write_rows
from harness.runs import QUIET, quiet_lightning
from harness.timing import in_turn, ratio
from lightning_eff.callbacks import (
    EMA,
    MISA,
    AsyncCheckpoint,
    CheckpointAveraging,
    ExactResume,
    GradES,
    GradientStats,
    Preemption,
    RunHealth,
    SpectralAlignmentMonitor,
    TrainingGuard,
    ZClip,
)


class Small(L.LightningModule):
    """Blocks of four matrices of 4 x 4."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(4))) for _ in range(blocks)
        )

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            batch = batch + block(batch)
        loss = batch.square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class CpuTimes(L.Callback):
    """CPU time of the whole process for each step."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.marks = warmup, []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.process_time())

    on_train_end = on_train_batch_start

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.marks[self.warmup :])]


ARMS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "Lightning's clip": lambda: dict(gradient_clip_val=1.0, gradient_clip_algorithm="norm"),
    "ZClip": lambda: dict(callbacks=[ZClip()]),
    # All matrices are watched or sampled, and none is ever frozen.
    "GradES": lambda: dict(callbacks=[GradES(tau=1e-9, alpha=0.0, max_events=None)]),
    "MISA": lambda: dict(callbacks=[MISA(budget=1.0, momentum_step=False, every_n_steps=10**6)]),
    "EMA": lambda: dict(callbacks=[EMA(0.999)]),
    "CheckpointAveraging, every step": lambda: dict(callbacks=[CheckpointAveraging(window=4, every_n_steps=1)]),
    "SpectralAlignmentMonitor": lambda: dict(callbacks=[SpectralAlignmentMonitor()]),
    "TrainingGuard": lambda: dict(callbacks=[TrainingGuard()]),
    "Preemption": lambda: dict(callbacks=[Preemption(signals=["SIGUSR2"])]),
    "ExactResume": lambda: dict(callbacks=[ExactResume()]),
    "AsyncCheckpoint": lambda: dict(callbacks=[AsyncCheckpoint()]),
    "GradientStats": lambda: dict(callbacks=[GradientStats()]),
    "RunHealth": lambda: dict(callbacks=[RunHealth()]),
}
"""Arguments of the Trainer."""


def measure(arms: list[str], steps: int, rounds: int, tensors: int) -> None:
    """Each over a bare step, in turn: of each run the least and the mean of a step, medians over the rounds.

    The least leaves out what other processes take from the caches, and the steps in which a method does what it does
    every n steps; the mean has both.
    """
    torch.set_num_threads(1)
    data = torch.utils.data.DataLoader([torch.randn(1, 4)] * (steps + 10), batch_size=None)  # type: ignore[arg-type]
    means: dict[str, list[float]] = {arm: [] for arm in arms}

    def run(arm: str) -> float:
        times = CpuTimes(warmup=10)
        arguments = ARMS[arm]()
        callbacks = [*arguments.pop("callbacks", ()), times]
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, log_every_n_steps=50,
                default_root_dir=folder, **QUIET, **arguments,
            )  # fmt: skip
            trainer.fit(Small(tensors // 4), data)
        means[arm].append(statistics.fmean(times.steps))
        return min(times.steps)

    figures = in_turn({arm: lambda arm=arm: run(arm) for arm in arms}, rounds)
    rows = []
    for arm in arms:
        middle, low, high = ratio(figures, arm, "none")
        rows.append(
            {
                "tensors": tensors,
                "shape": "4 x 4",
                "arm": arm,
                "rounds": rounds,
                "steps_per_round": steps,
                "least_cpu_ms_of_a_step": round(statistics.median(figures[arm]) * 1e3, 2),
                "over_none": round(middle, 3),
                "over_none_q1": round(low, 3),
                "over_none_q3": round(high, 3),
                "mean_over_none": round(ratio(means, arm, "none")[0], 3),
            }
        )
    show("Many small tensors: CPU time of a step", rows)
    CONSOLE.print(write_rows("many_tensors", rows, key=("tensors", "arm")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=list(ARMS), help="these beside none")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--tensors", type=int, default=1000, help="how many there are")
    arguments = parser.parse_args()
    quiet_lightning("the mean gradient norm", "SpectralAlignmentMonitor")
    arms = ["none", *(arm for arm in arguments.only if arm != "none")]
    measure(arms, arguments.steps, arguments.rounds, arguments.tensors)


if __name__ == "__main__":
    main()
