"""What freezing saves of a step, what watching costs, and what two ranks still reduce.

    python -m benchmarks.grades ceiling --size 10m|50m     # step time with 0 to 100 % frozen against the FLOP count's
    python -m benchmarks.grades watching                   # the cost of a check
    python -m benchmarks.grades communication              # bytes that two ranks reduce

What it is worth in fine-tuning is in benchmarks/grades_worth.py. Rows go to benchmarks/results/grades_<part>.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.rows import CONSOLE, in_turn, ratio, show, write_rows
from benchmarks.runs import QUIET, quiet_lightning
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from lightning_eff.callbacks import GradES
from lightning_eff.training.trainable import set_trainable

SIZES = {
    "10m": (GPTConfig(block_size=256, n_layer=8, n_head=5, n_embd=320), 4),
    "50m": (GPTConfig(block_size=512, n_layer=10, n_head=10, n_embd=640), 1),
}
"""The examples' shapes, and sequences a step."""

FROZEN = {
    "0 %": (),
    "25 %": ("query", "key", "value"),
    "50 %": ("query", "key", "up"),
    "75 %": ("out", "up", "down"),
    "100 %": ("query", "key", "value", "out", "up", "down"),
}
"""Layers of every block whose weights make up that part of the blocks' weights."""


class Freeze(Callback):
    """Closes layers before the first step, in the way that GradES does."""

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        frozen = [name for name, _ in module.named_parameters() if name.split(".")[-2] in self.layers]
        set_trainable(trainer, dict.fromkeys(frozen, False))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.requires_grad_(True)


class StepTimes(Callback):
    """Seconds of every step but the first, from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    on_train_end = on_train_batch_start

    @property
    def median(self) -> float:
        return statistics.median(b - a for a, b in itertools.pairwise(self.marks[1:]))


def step_time(module: L.LightningModule, data: L.LightningDataModule, steps: int, *callbacks: Callback) -> float:
    """Median seconds of a step in the Trainer."""
    times = StepTimes()
    trainer = L.Trainer(devices=1, max_steps=steps + 1, limit_val_batches=0, callbacks=[times, *callbacks], **QUIET)
    trainer.fit(module, data)
    return times.median


# --- ceiling ---------------------------------------------------------------------------------------------------------


def step_flops(config: GPTConfig, frozen: float) -> float:
    """Of a step, for one byte: three products with each weight matrix, two with a frozen one; and causal attention."""
    blocks = config.n_layer * 12 * config.n_embd**2
    head = config.n_embd * 256
    attention = config.n_layer * 3 * 2 * config.block_size * config.n_embd
    return 2 * (3 * blocks + 3 * head - frozen * blocks) + attention


def ceiling(size: str, steps: int, rounds: int) -> None:
    """Step time with parts of the block matrices frozen, in turn, against the limit of the FLOP count."""
    config, batch_size = SIZES[size]
    data = TextDataModule(block_size=config.block_size, batch_size=batch_size)
    module = GPTModule(config, schedule="constant", warmup_steps=0, fused=True)
    variants: dict[str, Callable[[], float]] = {
        name: lambda layers=layers: step_time(module, data, steps, Freeze(layers)) for name, layers in FROZEN.items()
    }
    figures = in_turn(variants, rounds)
    rows = []
    for name in FROZEN:
        part = float(name.split()[0]) / 100
        middle, low, high = ratio(figures, name, "0 %")
        limit = step_flops(config, part) / step_flops(config, 0.0)
        rows.append(
            {
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
                "tokens_per_step": batch_size * config.block_size,
                "frozen": name,
                "rounds": rounds,
                "steps_per_round": steps,
                "step_ms": round(statistics.median(figures[name]) * 1e3, 1),
                "over_unfrozen": round(middle, 4),
                "over_unfrozen_q1": round(low, 4),
                "over_unfrozen_q3": round(high, 4),
                "flop_limit": round(limit, 4),
                "over_limit": round(middle / limit, 4),
            }
        )
    show(f"Step time with parts of the {size} GPT frozen, side by side", rows)
    CONSOLE.print(write_rows(f"grades_ceiling_{size}", rows))


def watching(size: str, steps: int, rounds: int) -> None:
    """A check at every step against none, in turn; the default checks every tenth."""
    config, batch_size = SIZES[size]
    data = TextDataModule(block_size=config.block_size, batch_size=batch_size)
    module = GPTModule(config, schedule="constant", warmup_steps=0, fused=True)

    def run(metric: str | None) -> float:
        callbacks = [] if metric is None else [GradES(tau=1e-9, alpha=0.0, metric=metric, every_n_steps=1)]  # type: ignore[arg-type]
        return step_time(module, data, steps, *callbacks)

    figures = in_turn(
        {str(metric): lambda metric=metric: run(metric) for metric in (None, "grad_change", "grad")}, rounds
    )
    rows = []
    for metric in ("grad_change", "grad"):
        middle, low, high = ratio(figures, metric, "None")
        watched = sum(
            p.numel() * p.element_size() for n, p in module.named_parameters() if ".blocks." in n and p.ndim > 1
        )
        rows.append(
            {
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
                "tokens_per_step": batch_size * config.block_size,
                "metric": metric,
                "rounds": rounds,
                "steps_per_round": steps,
                "step_ms": round(statistics.median(figures["None"]) * 1e3, 1),
                "check_over_step": round(middle - 1, 4),
                "check_over_step_q1": round(low - 1, 4),
                "check_over_step_q3": round(high - 1, 4),
                "over_step_every_10": round((middle - 1) / 10, 4),
                "copies_mb": round(watched / 1e6, 1) if metric == "grad_change" else 0,
            }
        )
    show("Cost of watching", rows)
    CONSOLE.print(write_rows("grades_watching", rows))


# --- communication ---------------------------------------------------------------------------------------------------


class CountsBytes(Callback):
    """What DDP reduces in each step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.model.register_comm_hook(self, _count_and_reduce)  # type: ignore[union-attr, operator]

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(0)


def _count_and_reduce(counter, bucket):  # DDP refuses annotations that are strings
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    counter.steps[-1] += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)


def _reduced(part: float) -> tuple[list[int], list[int], int]:
    from lightning.pytorch.strategies import DDPStrategy

    quiet_lightning()
    counter = CountsBytes()
    grades = GradES(
        tau=1e9, tau_mode="absolute", alpha=0.0, every_n_steps=1, patience=1, max_events=None,
        max_frozen_ratio=max(part, 0.01), stop_when_frozen=False,
    )  # fmt: skip
    callbacks = [counter, grades] if part else [counter]
    module = GPTModule(GPTConfig(block_size=64), schedule="constant", warmup_steps=0)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=8, limit_val_batches=0, callbacks=callbacks, **QUIET
    )
    trainer.fit(module, TextDataModule(block_size=64, batch_size=2))
    same = [float(parameter.detach().double().sum()) for parameter in module.parameters()]
    return counter.steps, same, sum(parameter.numel() for parameter in module.parameters())  # type: ignore[return-value]


def communication() -> None:
    """Bytes that a rank hands to the reduction in a step, before and after GradES has frozen a part."""
    from tests.distributed.pool import Pool

    rows = []
    pool = Pool(2)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        (steps, weights, parameters), (other, other_weights, _) = pool.run(_reduced, part)
        assert steps == other, "the ranks reduce different amounts"
        assert weights == other_weights, "the ranks have drifted apart"
        rows.append(
            {
                "parameters": parameters,
                "frozen_matrices": f"{part:.0%}",
                "bytes_before": steps[0],
                "bytes_after": steps[-1],
                "after_over_before": round(steps[-1] / steps[0], 4),
                "ranks": 2,
                "backend": "gloo",
            }
        )
    pool.close()
    show("Bytes reduced in a step, by rank", rows)
    CONSOLE.print(write_rows("grades_communication", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ceiling", "watching", "communication"))
    parser.add_argument("--size", choices=tuple(SIZES), default="10m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    quiet_lightning()
    if arguments.part == "communication":
        communication()
    else:
        measure = ceiling if arguments.part == "ceiling" else watching
        measure(arguments.size, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
