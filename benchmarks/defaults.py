"""What the defaults of ZClip, MISA and GradES do on ten ordinary models in 300 steps, beside what they did before.

    python -m benchmarks.defaults zclip   # three caps on healthy runs
    python -m benchmarks.defaults spike   # the same with a spike in the warm-up
    python -m benchmarks.defaults misa    # eta=1 and eta="auto": what importance decides
    python -m benchmarks.defaults grades  # what is frozen, at a constant rate and at one that falls to 0

Before and after are arguments of the same code, one after the other on the same batches; seeds 0 and 1, or 0.
A loss is the mean training loss of the last 50 steps; a GAN's is its judge's, which says nothing. Rows go to
benchmarks/results/defaults_zclip.csv, defaults_misa.csv and defaults_grades.csv.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from benchmarks.defaults_models import MODELS, Gan, Task
from benchmarks.rows import publish, show, write_rows
from harness.recorders import Losses
from harness.runs import begin, quiet_trainer
from lightning_eff.callbacks import MISA, GradES, ZClip

STEPS, SEEDS, LAST = 300, (0, 1), 50
SPIKE_STEP, SPIKE = 10, 100.0


class Spike(L.Callback):
    """Makes the gradients of one batch, within the warm-up, a hundred times as large."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == SPIKE_STEP:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= SPIKE


class Norms(L.Callback):
    """The gradient norm of each step, of all optimizers one after the other, before anything clips it."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())


class Cosine(L.Callback):
    """Lets the rate of each optimizer fall to 0 with the end of the run."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        done = (trainer.fit_loop.epoch_loop.total_batch_idx + 1) / STEPS
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group["lr"] = group.setdefault("first_lr", group["lr"]) * (0.5 + 0.5 * math.cos(math.pi * done))


def train(name: str, seed: int, *callbacks: L.Callback) -> tuple[Task, L.Trainer, float]:
    """Train a model anew; the module, the Trainer and the loss at the end."""
    begin(seed, ".*max_epochs.*", "MISA", "the mean gradient norm")
    module, losses = MODELS[name](), Losses()
    steps = STEPS * (2 if isinstance(module, Gan) else 1)  # Lightning counts those of both optimizers
    trainer = quiet_trainer(*callbacks, losses, accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1)
    trainer.fit(module)
    return module, trainer, statistics.fmean(losses.values[-LAST:])


def _mean(values: Sequence[float], digits: int = 4) -> str:
    """Mean, and lowest to highest."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}g} ({low:.{digits}g} - {high:.{digits}g})"


def zclip(spike: bool) -> None:
    """Each cap on each model, on a healthy run or with a spike in the warm-up."""
    arms: dict[str, dict[str, Any]] = {
        "1.0, before": {"max_grad_norm": 1.0},
        "None": {"max_grad_norm": None},
        "auto": {},
        "auto, relearn_after=100, before": {"relearn_after": 100},
    }
    rows = []
    for name in MODELS:
        extra, norms = [Spike()] if spike else [], Norms()
        plain = [train(name, seed, *extra, norms)[2] for seed in SEEDS]
        row = {"model": name, "spike": f"step {SPIKE_STEP}, {SPIKE:g} times" if spike else "none"}
        row |= {"median_norm": f"{statistics.median(norms.norms):.3g}"}
        rows.append({**row, "cap": "no ZClip", "clipped": 0.0, "outliers": 0.0, "loss": _mean(plain)})
        for cap, arguments in arms.items():
            callbacks = [ZClip(**arguments) for _ in SEEDS]
            losses = [train(name, seed, *extra, callback)[2] for seed, callback in zip(SEEDS, callbacks, strict=True)]
            states = [state for callback in callbacks for state in callback.state_dict()["optimizers"]]
            steps = sum(state["steps"] for state in states)
            shares = {"clipped": "clipped", "outliers": "spikes"}
            figures = {key: round(sum(state[of] for state in states) / steps, 4) for key, of in shares.items()}
            rows.append({**row, "cap": cap, **figures, "loss": _mean(losses)})
        print(*rows[-1 - len(arms) :], sep="\n", flush=True)
    show("Share of steps clipped, by the z-score (outliers) or the cap", rows)
    print(write_rows("defaults_zclip", rows, key=("spike",)))


def misa() -> None:
    """Each eta on each model, beside training all of it."""
    arms: dict[str, dict[str, Any]] = {"1.0, before": {"eta": 1.0}, "auto": {}}
    rows = []
    for name in MODELS:
        include = {"include": ["net.generator.*weight"]} if name == "GAN" else {}  # of one optimizer
        plain = _mean([train(name, seed)[2] for seed in SEEDS])
        for arm, arguments in arms.items():
            runs = [_sampled(name, seed, MISA(**arguments, **include, seed=seed)) for seed in SEEDS]
            figures = {key: round(statistics.fmean(run[key] for run in runs), 3) for key in runs[0] if key != "loss"}
            losses = _mean([run["loss"] for run in runs])
            rows.append({"model": name, "eta": arm, **figures, "loss": losses, "loss_of_all": plain})
            print(rows[-1], flush=True)
    publish("What importance decides", "defaults_misa", rows)


def _sampled(name: str, seed: int, callback: MISA) -> dict[str, float]:
    _, trainer, loss = train(name, seed, callback)
    sampler = callback.state_dict()["sampler"]
    turns = [int(each) for each in sampler["turns"]]
    return {
        "matrices": len(turns),
        "had_a_turn": float(trainer.callback_metrics["misa/used"]),
        "effective": float(trainer.callback_metrics["misa/effective"]),
        "turns": sum(turns),
        "turns_by_importance": sampler["drawn"] / sum(turns),
        "loss": loss,
    }


def grades(seeds: int) -> None:
    """Each rule on each model, beside training without."""
    arms: dict[str, dict[str, Any]] = {
        "grad_change, relative 0.5, before": {"metric": "grad_change", "tau_mode": "relative", "tau": 0.5},
        "default": {},
    }
    rows = []
    for name in MODELS:
        for rate, extra in (("constant", []), ("cosine", [Cosine()])):
            plain = _mean([train(name, seed, *extra)[2] for seed in SEEDS[:seeds]])
            for arm, arguments in arms.items():
                runs = [_frozen(name, seed, extra, GradES(**arguments)) for seed in SEEDS[:seeds]]
                figures = {key: round(statistics.fmean(run[key] for run in runs), 3) for key in runs[0]}
                losses = _mean([run["loss"] for run in runs])
                rows.append(
                    {
                        "model": name,
                        "seeds": seeds,
                        "rate": rate,
                        "rule": arm,
                        **figures,
                        "loss": losses,
                        "loss_of_all": plain,
                    }
                )
                print(rows[-1], flush=True)
    publish("What is frozen", "defaults_grades", rows)


def _frozen(name: str, seed: int, extra: list[L.Callback], callback: GradES) -> dict[str, float]:
    _, trainer, loss = train(name, seed, *extra, callback)
    matrices = len(callback.state_dict()["watch"]["names"])
    made = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return {"matrices": matrices, "share_frozen": len(callback.frozen) / matrices, "steps": made, "loss": loss}


if __name__ == "__main__":
    parts = {
        "zclip": lambda: zclip(spike=False),
        "spike": lambda: zclip(spike=True),
        "misa": misa,
        "grades": lambda: grades(given.seeds),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--seeds", type=int, choices=(1, 2), default=2, help="of grades")
    given = parser.parse_args()
    parts[given.part]()
