"""GradES against EarlyStopping on validation, in seconds, on runs that settle; freezing and stopping apart.

    python -m benchmarks.worth grades [run ...]

Runs of `benchmarks.grades_records`, all at a cosine rate: a CNN and a ViT on digits (27 epochs), a text classifier (a
pre-trained byte GPT, tuned to say of 64 bytes which package they are from, 10 epochs; other files are held out), and
LoRA on a pre-trained byte GPT (20 epochs of a small text). Each arm is really trained, three seeds, the arms in turn:
plain; `GradES()`, which needs no validation; the same made to go on to the end, which saves by freezing alone;
EarlyStopping, validating 20 times in the run with a patience of 3.

`seconds` are CPU time of one thread in `fit`, which other work on the machine changes little, of which `validating` is
a part; `wall_s` is by the clock. `spared` is the part of the products with weights of all backward passes that freezing
left out. `loss` and `accuracy` are the held-out ones of the last weights, `best` the lowest loss that a validation saw:
a ModelCheckpoint would have kept those weights. EarlyStopping looks at the data that it is judged by, which flatters
its `best`.

All arms are looked at every 60 steps, which no time counts. `reached_s` are the seconds at which the held-out
accuracy first was that of the plain run's end (0.1 % less at most), so what a stop in hindsight would have taken.

Rows go to benchmarks/results/worth_grades.csv.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.grades_records import BATCH, Settling, make
from benchmarks.grades_worth import FreezeNames, phases
from benchmarks.rows import show, write_rows
from harness.runs import quiet_trainer
from harness.timing import now, seconds_of
from lightning_eff.callbacks import GradES
from lightning_eff.structure import backward_flops

SEEDS, VALIDATIONS, PATIENCE, LOOK_EVERY = (0, 1, 2), 20, 3, 60
RUNS = ("CNN, cosine", "ViT, cosine", "text classifier, cosine", "LoRA, 20 epochs, cosine")
PLAIN, GOES_ON = "plain", "GradES, goes on"
ARMS = (PLAIN, "GradES()", GOES_ON, "EarlyStopping")


@dataclass
class Clock(L.Callback):
    """CPU seconds of validations, and of looks at the held-out data, which are not the run's."""

    validating: float = 0.0
    looking: float = 0.0
    looking_wall: float = 0.0
    seen: list[tuple[float, float]] = field(default_factory=list)  # seconds of the run, accuracy

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % LOOK_EVERY == 0:
            begin, wall = time.process_time(), now()
            assert isinstance(pl_module, Settling)
            self.seen.append((begin - self.start - self.looking, pl_module.judge()[1]))
            self.looking += time.process_time() - begin
            self.looking_wall += now() - wall

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.process_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating += time.process_time() - self.begin


def train(name: str, seed: int, arm: str, wanted: float | None = None) -> dict[str, Any]:
    """One run of one arm; the accuracy that is to be reached is by default that of its own end."""
    module, steps = make(name, seed)
    clock, rule, grades = Clock(), EarlyStopping("val_loss", patience=PATIENCE), None
    callbacks: list[L.Callback] = [clock]
    how: dict[str, Any] = {}
    if arm == "EarlyStopping":
        callbacks.append(rule)
        how = {"val_check_interval": steps // VALIDATIONS, "check_val_every_n_epoch": None}
    elif arm != PLAIN:
        grades = GradES(stop_when_frozen=arm != GOES_ON)
        callbacks.append(grades)
        how = {"min_steps": steps} if arm == GOES_ON else {}
    trainer = quiet_trainer(
        *callbacks, accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, num_sanity_val_steps=0, **how
    )
    held_out = _held_out(module) if arm == "EarlyStopping" else None
    begin = time.process_time()
    wall = seconds_of(lambda: trainer.fit(module, val_dataloaders=held_out))
    seconds = time.process_time() - begin - clock.looking
    loss, accuracy = module.judge()
    reached = [at for at, found in clock.seen if found >= (accuracy if wanted is None else wanted) - 1e-3]
    return {
        "run": name,
        "arm": arm,
        "seed": seed,
        "epochs": math.ceil(trainer.global_step / (len(module.data[0]) // BATCH)),
        "planned_steps": steps,
        "steps": trainer.global_step,
        "frozen": "" if grades is None else len(grades.frozen),
        "spared": "" if grades is None else round(spared(module, grades.frozen, trainer.global_step), 4),
        "seconds": round(seconds, 2),
        "validating": round(clock.validating, 2),
        "reached_s": round(reached[0], 2) if reached else "",
        "wall_s": round(wall - clock.looking_wall, 2),
        "loss": round(loss, 4),
        "accuracy": round(accuracy, 4),
        "best": round(float(rule.best_score), 4) if arm == "EarlyStopping" else "",
    }


def spared(module: L.LightningModule, frozen: dict[str, int], steps: int) -> float:
    """The part of the backward passes' products with weights that units frozen at these steps left out."""
    whole = backward_flops(module)
    made = 0
    for count, names in phases({"frozen": frozen, "steps": steps}):
        freeze = FreezeNames(set(names))
        freeze.on_train_start(None, module)  # type: ignore[arg-type]
        made += count * backward_flops(module)
        freeze.on_train_end(None, module)  # type: ignore[arg-type]
    return 1 - made / (steps * whole)


def _held_out(module: Settling) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*module.held_out), len(module.held_out[0]))


def compare(names: list[str]) -> None:
    """All arms of a run on all seeds."""
    rows = []
    for name in names or RUNS:
        for seed in SEEDS:
            wanted = None
            for arm in ARMS:
                rows.append(train(name, seed, arm, wanted))
                wanted = rows[-1]["accuracy"] if arm == PLAIN else wanted
                print(rows[-1], flush=True)
                write_rows("worth_grades", rows, key=("run", "seed", "arm"))
    show("GradES beside EarlyStopping", rows)
