"""What averaging weights costs, and what it is worth.

    python -m benchmarks.checkpoint_averaging cost   # step time and memory against none and against Lightning's EMA
    python -m benchmarks.checkpoint_averaging worth  # averages along a run at a constant high rate, and real decays

Rows go to benchmarks/results/checkpoint_averaging_<part>.csv, the curves to docs/images/checkpoint_averaging.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from benchmarks.gpt import GPT_1M, GPT_10M, constant, parameters, step_times, text, train, validation_loss
from benchmarks.rows import CONSOLE, show, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from harness.memory import resident
from harness.plots import IMAGES, by_step, mean_and_range, panels, save
from harness.processes import apart, spawned
from harness.runs import begin, quiet_lightning
from harness.timing import StepTimes, in_turn, over
from lightning_eff.callbacks import EMA, CheckpointAveraging

TINY = dict(n_layer=1, n_head=2, n_embd=16)
UNSAID = "Be aware that when using `ckpt_path`"


# --- cost ------------------------------------------------------------------------------------------------------------

WARM_UP, MEASURED, WINDOW = 5, 10, 4  # steps, steps, snapshots: the window at every step is full after the warm-up


def _averaging(every_n_steps: int) -> CheckpointAveraging:
    return CheckpointAveraging(window=WINDOW, every_n_steps=every_n_steps)


COST: dict[str, Callable[[], list[L.Callback]]] = {
    "none": list,
    "CheckpointAveraging, every step": lambda: [_averaging(1)],
    "CheckpointAveraging, every 10": lambda: [_averaging(10)],
    "CheckpointAveraging, every 100": lambda: [_averaging(100)],  # no snapshot falls into the steps measured
    "EMA, every step": lambda: [EMA(0.999)],
    "EMA of two widths, every step": lambda: [EMA(widths=[0.05, 0.1])],
    "Lightning EMAWeightAveraging": lambda: [EMAWeightAveraging(decay=0.999)],
}


class Resident(L.Callback):
    """MB of memory of this process at the end of the training."""

    def on_train_end(self, *_: Any) -> None:
        self.megabytes = resident() / 1e6


def _train_10m(callbacks: str, model: GPTModule, batch_size: int, *others: L.Callback) -> StepTimes:
    callbacks = [*COST[callbacks](), *others]
    return step_times(model, text(GPT_10M, batch_size), MEASURED, *callbacks, warmup=WARM_UP)


def _model(tiny: bool) -> GPTModule:
    return constant(GPTConfig(block_size=256, **TINY) if tiny else GPT_10M)


def _memory(callbacks: str, tiny: bool, batch_size: int) -> float:
    quiet_lightning(UNSAID)
    memory = Resident()
    _train_10m(callbacks, _model(tiny), batch_size, memory)
    return memory.megabytes


def cost(rounds: int, batch_size: int, tiny: bool) -> None:
    """Mean step time of the 10 M GPT under each callback, in turn; memory, each in a process of its own."""
    model = _model(tiny)
    size = parameters(model)
    figures = in_turn({name: lambda name=name: _train_10m(name, model, batch_size).mean for name in COST}, rounds)
    # A hundred steps hold one snapshot: what it takes is the difference between ten steps with one and ten without.
    pairs = zip(figures["CheckpointAveraging, every 100"], figures["CheckpointAveraging, every 10"], strict=True)
    figures["CheckpointAveraging, every 100"] = [without + (with_ - without) / 10 for without, with_ in pairs]
    memory = {name: apart(_memory, name, tiny, batch_size) for name in COST}
    rows = [
        {
            "parameters": size,
            "tokens_per_step": batch_size * 256,
            "callback": name,
            "window": WINDOW if "Checkpoint" in name else "",
            "rounds": rounds,
            "steps_per_round": MEASURED,
            "step_ms": round(statistics.median(figures[name]) * 1e3, 2),
            **over(figures, name, "none", "over_none"),
            "memory_mb": round(memory[name] - memory["none"], 1),
            "one_model_mb": round(size * 4 / 1e6, 1),
        }
        for name in COST
    ]
    show("Cost of averaging: step time, side by side", rows)
    if not tiny:
        CONSOLE.print(write_rows("checkpoint_averaging_cost", rows))


# --- worth -----------------------------------------------------------------------------------------------------------

INTERVAL = 10  # steps between two snapshots: 16 of them are as long as the decay of 800 steps
BETWEEN = 50  # steps between two validations
DECAY = 0.2  # the part of a run that a real decay takes
CURVES = {  # metric -> name
    "val_loss": "constant rate",
    "lawa/4/val_loss": "LAWA, 4 snapshots",
    "lawa/8/val_loss": "LAWA, 8 snapshots",
    "lawa/val_loss": "LAWA, 16 snapshots",
    "wsm/8/val_loss": "WSM 1-sqrt, 8 snapshots",
    "wsm/val_loss": "WSM 1-sqrt, 16 snapshots",
    "ema/val_loss": "EMA, half-life 25",
}
DECAYED = "real decay (1-sqrt, last 20 %)"


class Decayed(GPTModule):
    """The same training, whose rate goes to zero from step ``begin`` to step ``end``."""

    begin, end = 0, 1

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = super().configure_optimizers()["optimizer"]

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = (step - self.begin) / (self.end - self.begin)
            return 1 - math.sqrt(min(1.0, max(0.0, progress)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Record(L.Callback):
    """Validation losses by step, and checkpoints at some steps, from which decays branch off."""

    def __init__(self, save_at: list[int], folder: str) -> None:
        self.points: list[tuple[int, str, float]] = []
        self.save_at, self.folder = save_at, Path(folder)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = trainer.callback_metrics
        self.points += [(trainer.global_step, CURVES[key], found[key].item()) for key in CURVES if key in found]


def run(seed: int, steps: int, lr: float, warmup: int, tiny: bool) -> list[tuple[int, str, float]]:
    """One constant run of the 1 M GPT on one thread with all its averages, and the decays that branch off it."""
    begin(seed, UNSAID)
    config = GPTConfig(block_size=128, **TINY) if tiny else GPT_1M
    arguments: dict[str, Any] = dict(lr=lr, schedule="constant", warmup_steps=warmup, fused=True)
    ends = sorted({round(steps * part / BETWEEN) * BETWEEN for part in (0.5, 0.75, 1)} - {0})
    branches = {end: round(end * (1 - DECAY)) for end in ends}

    def data() -> TextDataModule:
        return text(config, 16, val_windows=16 if tiny else 128, seed=seed)

    with tempfile.TemporaryDirectory() as folder:
        record = Record(list(branches.values()), folder)
        common: dict[str, Any] = dict(every_n_steps=INTERVAL, start_step=warmup, save="none")
        averages = [
            CheckpointAveraging("uniform", window=16, preview=[4, 8], name="lawa", **common),
            CheckpointAveraging("wsm", window=16, preview=[8], name="wsm", **common),
            EMA(half_life=25, save="none"),
        ]
        validates: dict[str, Any] = dict(
            limit_val_batches=1.0, val_check_interval=BETWEEN, check_val_every_n_epoch=None
        )
        train(GPTModule(config, **arguments), data(), *averages, record, max_steps=steps, **validates)
        points = record.points
        for end, start in branches.items():
            module = Decayed(config, **arguments)
            module.begin, module.end = start, end
            train(module, data(), max_steps=end, ckpt_path=f"{folder}/{start}.ckpt")
            points.append((end, DECAYED, validation_loss(module, data())))
    return points


def worth(steps: int, seeds: int, workers: int, lr: float, warmup: int, tiny: bool) -> None:
    """Validation loss over steps; what each average saves to the best loss of the constant run."""
    curves: list[dict[str, Any]] = []
    with spawned(workers) as pool:
        runs = [pool.submit(run, seed, steps, lr, warmup, tiny) for seed in range(seeds)]
        for seed, done in enumerate(runs):
            curves += [
                {"lr": lr, "seed": seed, "curve": curve, "step": step, "val_loss": round(loss, 4)}
                for step, curve, loss in done.result()
            ]
    rows = [_summary(curves, curve, seed) for curve in [*CURVES.values(), DECAYED] for seed in range(seeds)]
    show("Worth of averaging", rows)
    if not tiny:
        CONSOLE.print(write_rows("checkpoint_averaging_worth", rows))
        CONSOLE.print(write_rows("checkpoint_averaging_worth_curves", curves))
    plot(curves, seeds, Path(tempfile.gettempdir()) if tiny else IMAGES)


def _summary(curves: list[dict[str, Any]], curve: str, seed: int) -> dict[str, Any]:
    """The last loss of a curve, and the steps that it needs less than the constant run to the latter's best loss."""
    constant, own = (
        [(row["step"], row["val_loss"]) for row in curves if row["seed"] == seed and row["curve"] == name]
        for name in ("constant rate", curve)
    )
    best_step, best = min(constant, key=lambda point: (point[1], point[0]))
    reached = next((step for step, loss in own if loss <= best), None)
    return {
        "curve": curve,
        "seed": seed,
        "steps": own[-1][0],
        "val_loss": own[-1][1],
        "below_constant": round(constant[-1][1] - own[-1][1], 4),
        "best_of_constant": best,
        "reached_at": reached,
        "steps_saved": None if reached is None else best_step - reached,
    }


def plot(curves: list[dict[str, Any]], seeds: int, folder: Path) -> None:
    """Means over the seeds, with bands from the lowest to the highest."""
    figure, axes = panels(1, 8, 5)
    for curve in [*CURVES.values(), DECAYED]:
        losses = by_step((row["step"], row["val_loss"]) for row in curves if row["curve"] == curve)
        # What starts later, and what is far above the rest, would only flatten the picture.
        shown = {step: each for step, each in losses.items() if len(each) == seeds and step >= max(losses) / 4}
        style: dict[str, Any] = dict(marker="D", linestyle="none", color="black") if curve == DECAYED else {}
        mean_and_range(axes, shown, band=curve != DECAYED, label=curve, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title(f"Averages along a run at a constant rate, {seeds} seeds")
    axes.legend()
    CONSOLE.print(save(figure, folder / "checkpoint_averaging.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "worth"))
    parser.add_argument("--rounds", type=int, default=7, help="cost: how often each variant is measured")
    parser.add_argument("--batch-size", type=int, default=4, help="cost: sequences of 256 bytes a step")
    parser.add_argument("--steps", type=int, default=800, help="worth: steps of the constant run")
    parser.add_argument("--lr", type=float, default=6e-3, help="worth: the constant rate")
    parser.add_argument("--warmup", type=int, default=100, help="worth: steps in which the rate rises")
    parser.add_argument("--seeds", type=int, default=3, help="worth: number of seeds")
    parser.add_argument("--workers", type=int, default=2, help="worth: runs at a time, one thread each")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script: no rows are written")
    arguments = parser.parse_args()
    quiet_lightning(UNSAID)
    if arguments.part == "cost":
        cost(arguments.rounds, arguments.batch_size, arguments.tiny)
    else:
        worth(arguments.steps, arguments.seeds, arguments.workers, arguments.lr, arguments.warmup, arguments.tiny)


if __name__ == "__main__":
    main()
