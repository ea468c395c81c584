"""GradES against EarlyStopping on validation, in seconds, on runs that settle.

    python -m benchmarks.worth grades [run ...]

A CNN and a ViT on digits at a cosine rate, 27 epochs (the runs of `benchmarks.grades_records`). Each arm is really
trained, three seeds, the arms in turn: plain; `GradES()`, which needs no validation; EarlyStopping, validating 20
times in the run with a patience of 3.

`seconds` are CPU time of one thread in `fit`, which other work on the machine changes little, of which `validating` is
a part; `wall_s` is by the clock. `loss` is the held-out one of the last weights, `best` the lowest that a validation
saw: a ModelCheckpoint would have kept those weights. EarlyStopping looks at the data that it is judged by, which
flatters its `best`.

Rows go to benchmarks/results/worth_grades.csv.
"""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.grades_records import Settling, make
from benchmarks.rows import show, write_rows
from harness.runs import quiet_trainer
from harness.timing import seconds_of
from lightning_eff.callbacks import GradES

SEEDS, VALIDATIONS, PATIENCE = (0, 1, 2), 20, 3
RUNS = ("CNN, cosine", "ViT, cosine")
ARMS = ("plain", "GradES()", "EarlyStopping")


class Clock(L.Callback):
    """CPU seconds of validations."""

    seconds = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.process_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time() - self.begin


def train(name: str, seed: int, arm: str) -> dict[str, Any]:
    """One run of one arm."""
    module, steps = make(name, seed)
    clock, callbacks, validation = Clock(), [], {}
    rule = EarlyStopping("val_loss", patience=PATIENCE)
    if arm == "EarlyStopping":
        callbacks = [rule]
        validation = {"val_check_interval": steps // VALIDATIONS, "check_val_every_n_epoch": None}
    grades = GradES()
    if arm == "GradES()":
        callbacks = [grades]
    trainer = quiet_trainer(
        clock, *callbacks, accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, num_sanity_val_steps=0,
        **validation,
    )  # fmt: skip
    held_out = _held_out(module) if validation else None
    begin = time.process_time()
    wall = seconds_of(lambda: trainer.fit(module, val_dataloaders=held_out))
    seconds = time.process_time() - begin
    return {
        "run": name,
        "arm": arm,
        "seed": seed,
        "epochs": math.ceil(trainer.global_step / (len(module.data[0]) // 16)),
        "planned_steps": steps,
        "steps": trainer.global_step,
        "frozen": len(grades.frozen) if callbacks == [grades] else "",
        "seconds": round(seconds, 2),
        "validating": round(clock.seconds, 2),
        "wall_s": round(wall, 2),
        "loss": round(module.score(), 4),
        "best": round(float(rule.best_score), 4) if validation else "",
    }


def _held_out(module: Settling) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*module.held_out), len(module.held_out[0]))


def compare(names: list[str]) -> None:
    """All arms of a run on all seeds."""
    rows = []
    for name in names or RUNS:
        for seed in SEEDS:
            for arm in ARMS:
                rows.append(train(name, seed, arm))
                print(rows[-1], flush=True)
                write_rows("worth_grades", rows, key=("run",))
    show("GradES beside EarlyStopping", rows)
