"""What freezing saves of a step, what watching costs, and what two ranks still reduce.

    python -m benchmarks.grades ceiling --size 10m|50m     # step time with 0 to 100 % frozen against the FLOP count's
    python -m benchmarks.grades watching                   # the cost of a check
    python -m benchmarks.grades communication              # bytes that two ranks reduce

What it is worth in fine-tuning is in benchmarks/grades_worth.py. Rows go to benchmarks/results/grades_<part>.csv.
"""

from __future__ import annotations

import argparse
import statistics

import lightning as L
from lightning.pytorch.callbacks import Callback

from benchmarks.gpt import constant, parameters, step_times, text, train
from benchmarks.rows import publish
from examples.gpt.model import GPTConfig
from harness.pool import Pool
from harness.recorders import Reduced
from harness.runs import ddp, quiet_lightning
from harness.timing import in_turn, over, ratio
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
    data, module = text(config, batch_size), constant(config)
    variants = {
        name: lambda layers=layers: step_times(module, data, steps, Freeze(layers)).median
        for name, layers in FROZEN.items()
    }
    figures = in_turn(variants, rounds)
    rows = []
    for name in FROZEN:
        part = float(name.split()[0]) / 100
        limit = step_flops(config, part) / step_flops(config, 0.0)
        rows.append(
            {
                "parameters": parameters(module),
                "tokens_per_step": batch_size * config.block_size,
                "frozen": name,
                "rounds": rounds,
                "steps_per_round": steps,
                "step_ms": round(statistics.median(figures[name]) * 1e3, 1),
                **over(figures, name, "0 %", "over_unfrozen"),
                "flop_limit": round(limit, 4),
                "over_limit": round(ratio(figures, name, "0 %")[0] / limit, 4),
            }
        )
    publish(f"Step time with parts of the {size} GPT frozen, side by side", f"grades_ceiling_{size}", rows)


def watching(size: str, steps: int, rounds: int) -> None:
    """A check at every step against none, in turn; the default checks every tenth."""
    config, batch_size = SIZES[size]
    data, module = text(config, batch_size), constant(config)

    def run(metric: str | None) -> float:
        callbacks = [] if metric is None else [GradES(tau=1e-9, alpha=0.0, metric=metric, every_n_steps=1)]  # type: ignore[arg-type]
        return step_times(module, data, steps, *callbacks).median

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
                "parameters": parameters(module),
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
    publish("Cost of watching", "grades_watching", rows)


# --- communication ---------------------------------------------------------------------------------------------------


def _reduced(part: float) -> tuple[list[int], list[float], int]:
    quiet_lightning()
    counter = Reduced()
    grades = GradES(
        tau=1e9, tau_mode="absolute", alpha=0.0, every_n_steps=1, patience=1, max_events=None,
        max_frozen_ratio=max(part, 0.01), stop_when_frozen=False,
    )  # fmt: skip
    callbacks = [counter, grades] if part else [counter]
    config = GPTConfig(block_size=64)
    module = constant(config, fused=False)
    train(module, text(config, 2), *callbacks, accelerator="cpu", devices=2, strategy=ddp(), max_steps=8)
    same = [float(parameter.detach().double().sum()) for parameter in module.parameters()]
    return counter.bytes, same, parameters(module)


def communication() -> None:
    """Bytes that a rank hands to the reduction in a step, before and after GradES has frozen a part."""
    rows = []
    with Pool(2) as pool:
        for part in (0.0, 0.25, 0.5, 0.75, 1.0):
            (steps, weights, size), (other, other_weights, _) = pool.run(_reduced, part)
            assert steps == other, "the ranks reduce different amounts"
            assert weights == other_weights, "the ranks have drifted apart"
            rows.append(
                {
                    "parameters": size,
                    "frozen_matrices": f"{part:.0%}",
                    "bytes_before": steps[0],
                    "bytes_after": steps[-1],
                    "after_over_before": round(steps[-1] / steps[0], 4),
                    "ranks": 2,
                    "backend": "gloo",
                }
            )
    publish("Bytes reduced in a step, by rank", "grades_communication", rows)


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
