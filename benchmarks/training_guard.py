"""What TrainingGuard saves, and what it costs.

    python -m benchmarks.training_guard rescue  # runs of the example GPT that fail, without the guard and with it
    python -m benchmarks.training_guard draws   # runs that random draws break, again and again
    python -m benchmarks.training_guard plot    # their curves, as docs/images/training_guard.png
    python -m benchmarks.training_guard cost    # step time with the guard over without; what a snapshot takes

Rows go to benchmarks/results/training_guard_<part>.csv, those of `rescue` after each run.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.gpt import GPT_1M, GPT_10M, constant, parameters, step_times, text, train, validation_loss
from benchmarks.rows import CONSOLE, publish, read_rows, show, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from harness.plots import IMAGES, panels, save
from harness.recorders import Alarms, Losses
from harness.runs import QUIET, begin, quiet_lightning
from harness.timing import in_turn, over, seconds_of
from lightning_eff.callbacks import (
    NonFiniteLoss,
    SpectralAlignmentMonitor,
    TrainingDivergedError,
    TrainingGuard,
)
from lightning_eff.callbacks.training_guard.rollback import capture, restore
from lightning_eff.callbacks.training_guard.run_snapshots import RunSnapshots

# --- rescue ----------------------------------------------------------------------------------------------------------

FAULT = 150  # the batch at which a run begins to fail


class FlipBit(L.Callback):
    """The highest bit of the exponent of one weight is set, once, as a fault of the memory would do it."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == FAULT:
            weight = pl_module.model.blocks[2].mlp.down.weight.data.view(-1)[:1]
            weight.copy_((weight.view(torch.int32) | (1 << 30)).view(torch.float32))


class BadData(L.Callback):
    """Twenty batches in a row are random bytes."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        if FAULT <= batch_idx < FAULT + 20:
            generator = torch.Generator().manual_seed(batch_idx)
            batch.copy_(torch.randint(0, 256, batch.shape, generator=generator))


class Ramp(GPTModule):
    """The rate grows by 5 % a step from step FAULT on: a schedule with a mistake."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        super().lr_scheduler_step(scheduler, metric)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 1.05 ** max(0, scheduler.last_epoch - FAULT)


FAILURES: dict[str, tuple[type[GPTModule], float, list[type[L.Callback]]]] = {
    "none": (GPTModule, 3e-3, []),
    "bit flip": (GPTModule, 3e-3, [FlipBit]),
    "bad data": (GPTModule, 3e-3, [BadData]),
    "rate ramp": (Ramp, 3e-3, []),
}

# Intervals for runs of some hundred steps; the rules, their thresholds and `spectral`'s are the defaults.
SHORT: dict[str, Any] = dict(every_n_steps=20, margin=20, read_every_n_steps=5)


def _guard(**arguments: Any) -> list[L.Callback]:
    return [SpectralAlignmentMonitor(every_n_steps=5, action="rollback"), TrainingGuard(**SHORT, **arguments)]


GUARDS: dict[str, Callable[[], list[L.Callback]]] = {
    "watched only": lambda: [SpectralAlignmentMonitor(every_n_steps=5, action="warn"), TrainingGuard("warn", **SHORT)],
    "rollback": _guard,
    "rollback, loss rules alone": lambda: [TrainingGuard(**SHORT)],
    "rollback, a tenth of the rate to the end": lambda: _guard(lr_factor=0.1, lr_steps=None),
}

RUNS = [
    ("none", "watched only"),
    ("bit flip", "watched only"),
    ("bit flip", "rollback, loss rules alone"),
    ("rate ramp", "watched only"),
    ("rate ramp", "rollback, a tenth of the rate to the end"),
    ("bad data", "watched only"),
    ("bad data", "rollback, loss rules alone"),
]


def run(failure: str, guard: str, seed: int, steps: int) -> tuple[dict[str, Any], list[float]]:
    """One run of the 1 M GPT on one thread: its row and the loss of every batch."""
    begin(seed)
    logging.getLogger("lightning_eff").setLevel(logging.ERROR)
    kind, lr, faults = FAILURES[failure]
    model = kind(GPT_1M, lr=lr, warmup_steps=50, fused=True)
    data = text(GPT_1M, 4, val_windows=256, seed=seed)
    record, heard, guards = Losses(), Alarms(), GUARDS[guard]()
    end = "finished"
    try:
        train(model, data, record, heard, *(fault() for fault in faults), *guards, max_steps=steps)
    except TrainingDivergedError:
        end = "given up"
    losses = record.values
    last = [c for c in guards if isinstance(c, TrainingGuard)]
    row = {
        "failure": failure,
        "guard": guard,
        "seed": seed,
        "steps": steps,
        "tokens_per_step": 4 * GPT_1M.block_size,
        "end": end,
        "val_loss": round(validation_loss(model, data), 4),
        "train_loss_last_50": round(statistics.fmean(losses[-50:]), 4),
        "train_loss_highest_after_fault": round(max(losses[FAULT:]), 4),
        "batches": len(losses),
        "alarms": sum(g.alarms for g in last),
        "alarms_of_the_spectral_monitor": len(heard.steps),
        "first_of_these": heard.steps[0] if heard.steps else "",
        "rollbacks": sum(g.rollbacks for g in last),
        "undone_steps": sum(g.undone_steps for g in last),
    }
    return row, losses


def rescue(steps: int, seeds: list[int], failures: list[str]) -> None:
    """Train every pair of a failure and a guard. Rows are written after each run, and those of other runs stay."""
    for seed in seeds:
        for failure, guard in (run for run in RUNS if run[0] in failures):
            row, losses = run(failure, guard, seed, steps)
            key = ("failure", "guard", "seed")
            about = {name: row[name] for name in key}
            points = [{**about, "batch": i, "train_loss": round(losses[i], 4)} for i in range(0, len(losses), 3)]
            for name, new in (("training_guard_rescue", [row]), ("training_guard_rescue_curves", points)):
                write_rows(name, new, key)
            CONSOLE.print(row)


def plot() -> None:
    """The training loss of the first seed over the batches, a panel for each failure."""
    rows = [row for row in read_rows("training_guard_rescue_curves") if row["seed"] == "0"]
    measured = {(row["failure"], row["guard"]) for row in rows}
    failures = [failure for failure, guard in RUNS if guard == "watched only" and failure != "none"]
    failures = [failure for failure in failures if (failure, "watched only") in measured]
    figure, axes = panels(len(failures), 4.5, sharey=True)
    for axis, failure in zip(axes, failures, strict=True):
        for wanted, guard in [RUNS[0], *(run for run in RUNS if run[0] == failure and run in measured)]:
            points = [
                (int(row["batch"]), float(row["train_loss"]))
                for row in rows
                if (row["failure"], row["guard"]) == (wanted, guard)
            ]
            label = "healthy" if wanted == "none" else "without rollback" if guard == "watched only" else guard
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axis.set(title=failure, xlabel="batch", ylim=(1.7, 7))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("training loss, nats a byte")
    CONSOLE.print(save(figure, IMAGES / "training_guard.png"))


# --- draws -----------------------------------------------------------------------------------------------------------


class Gamble(GPTModule):
    """Draws a number in front of each batch, and one that is too low makes a weight NaN."""

    chance = 0.0
    bad = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.rand(()) < self.chance:
            self.bad += 1
            self.model.blocks[0].mlp.down.weight.data.view(-1)[0] = float("nan")


# For faults that come often: snapshots close to each other, and a count that begins anew soon.
OFTEN: dict[str, Any] = dict(
    every_n_steps=2, keep=8, margin=3, read_every_n_steps=1, max_rollbacks=10, forget_after=10, lr_factor=1.0
)


def gamble(chance: float, draw_anew: bool, seed: int, steps: int) -> dict[str, Any]:
    """One run of a GPT of 30,000 parameters in which each step breaks the weights with a chance."""
    torch.set_num_threads(1)
    logging.getLogger("lightning_eff").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    model = Gamble(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32), lr=1e-3, warmup_steps=10)
    model.chance = chance
    data = TextDataModule(block_size=16, batch_size=2, val_windows=2, seed=seed)
    guard = TrainingGuard(rules=[NonFiniteLoss()], draw_anew=draw_anew, **OFTEN)
    trainer = L.Trainer(devices=1, max_steps=steps, callbacks=[guard], limit_val_batches=0, **QUIET)
    with suppress(TrainingDivergedError):
        trainer.fit(model, data)
    saved = trainer.global_step == steps and all(bool(p.isfinite().all()) for p in model.parameters())
    return {"bad": model.bad, "saved": saved, "rollbacks": guard.rollbacks, "undone_steps": guard.undone_steps}


def draws(steps: int, runs: int) -> None:
    """How many runs the guard saves from bad draws, with the same random numbers after a rollback and with others."""
    rows = []
    for chance in (0.005, 0.02, 0.06):
        for draw_anew in (False, True):
            found = [gamble(chance, draw_anew, seed, steps) for seed in range(runs)]
            met = [run for run in found if run["bad"]]
            saved = [run for run in met if run["saved"]]
            rows.append(
                {
                    "chance_a_step": chance,
                    "draw_anew": draw_anew,
                    "steps": steps,
                    "runs": runs,
                    "runs_with_a_bad_draw": len(met),
                    "of_these_saved": len(saved),
                    "mean_rollbacks_of_the_saved": round(statistics.fmean(r["rollbacks"] for r in saved), 2)
                    if saved
                    else "",
                    "mean_undone_steps_of_the_saved": (
                        round(statistics.fmean(r["undone_steps"] for r in saved), 1) if saved else ""
                    ),
                }
            )
            CONSOLE.print(rows[-1])
    show("Runs that random draws break", rows)
    CONSOLE.print(write_rows("training_guard_draws", rows))


# --- cost ------------------------------------------------------------------------------------------------------------


class TimesATake(L.Callback):
    """Takes snapshots at the end of a run: how long one takes, and how large it is."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        snapshots, self.seconds = RunSnapshots(2), []
        for step in range(7):
            self.seconds.append(seconds_of(lambda step=step: snapshots.take(step, capture(trainer))))
        self.bytes = RunSnapshots(1).bytes_of(capture(trainer))
        self.restore_seconds = seconds_of(lambda: restore(trainer, snapshots.read(6), number=1))


def cost(rounds: int, steps: int) -> None:
    """Mean step time of the 10.8 M GPT without the guard, with the guard between snapshots, and with snapshots."""
    data, model = text(GPT_10M, 4), constant(GPT_10M)
    variants = {
        "none": lambda: [],
        "guard, no snapshot": lambda: [TrainingGuard("stop", read_every_n_steps=5)],
        "guard, a snapshot in 10 steps": lambda: [
            TrainingGuard(every_n_steps=10, margin=1, read_every_n_steps=5, keep=2)
        ],
    }
    timed = {name: lambda some=some: step_times(model, data, steps, *some()).mean for name, some in variants.items()}
    figures = in_turn(timed, rounds)
    take = TimesATake()
    train(model, data, take, max_steps=1)
    rows = [
        {
            "parameters": parameters(model),
            "tokens_per_step": 4 * 256,
            "guard": name,
            "rounds": rounds,
            "steps_per_round": steps,
            "step_ms": round(statistics.median(figures[name]) * 1e3, 2),
            **over(figures, name, "none", "over_none"),
            "snapshot_MB": round(take.bytes / 1e6, 2),
            "first_snapshot_ms": round(take.seconds[0] * 1e3, 2),
            "snapshot_ms": round(statistics.median(take.seconds[2:]) * 1e3, 2),
            "restore_ms": round(take.restore_seconds * 1e3, 2),
        }
        for name in variants
    ]
    publish("Cost of the guard", "training_guard_cost", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rescue", "draws", "plot", "cost"))
    parser.add_argument("--steps", type=int, help="steps of a run (rescue: 300, draws: 200, cost: 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="rescue: seeds")
    parser.add_argument("--failures", nargs="+", default=list(FAILURES), choices=FAILURES, help="rescue: only these")
    parser.add_argument("--runs", type=int, default=20, help="draws: runs of each kind")
    parser.add_argument("--rounds", type=int, default=9, help="cost: how often each variant is measured")
    arguments = parser.parse_args()
    quiet_lightning()
    if arguments.part == "rescue":
        rescue(arguments.steps or 300, arguments.seeds, arguments.failures)
    elif arguments.part == "draws":
        draws(arguments.steps or 200, arguments.runs)
    elif arguments.part == "plot":
        plot()
    else:
        cost(arguments.rounds, arguments.steps or 20)


if __name__ == "__main__":
    main()
