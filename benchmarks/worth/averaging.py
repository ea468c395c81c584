"""Averages of weights, widely spaced too, against decays that are really run; and how noisy evaluations are.

    python -m benchmarks.worth averaging
    python -m benchmarks.worth averaging-decay

A byte GPT, a ViT and a CNN (those of `workloads`) at a constant rate after a warm-up, three seeds. At a half and at the
whole of 1,000 steps: the live weights; averages of eight snapshots that are 10, 20 or 40 steps apart; exponential
averages; and the rival, a run of as many steps whose rate decays over its last fifth (`WSD`), branched off that run.

Noise: over the last third of the run the held-out loss at every tenth step, of the live weights, of two averages, and,
as their rival, the mean of the live weights' last eight losses, which smooths the curve and not the model.
`checkpoint_sd`: the standard deviation about a straight line, mean over the seeds. `seed_sd`: that of the seeds, mean
over the steps. `later_is_better`: how often the later of two checkpoints 100 steps apart has the lower loss.

Rows go to benchmarks/results/worth_averaging.csv, worth_averaging_noise.csv and worth_averaging_curves.csv.

`averaging-decay` measures the noise alone, of the same runs at a rate that falls along a cosine to 0 from the warm-up
on, into worth_averaging_decay.csv and worth_averaging_decay_curves.csv.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import show, write_rows
from benchmarks.worth.clips import Fixed
from benchmarks.worth.stacks import Stack
from benchmarks.worth.workloads import WORKLOADS
from benchmarks.worth.zclip import best_rate
from lightning_eff.functional.averaging import wsm_weights
from lightning_eff.functional.wsd import WSD

STEPS, WARM_UP, SEEDS, EVERY, DECAY = 1000, 50, (0, 1, 2), 10, 0.2
TASKS = ("byte GPT", "ViT", "CNN")
HALF_LIVES = (25, 100)
LIVE, DECAYED = "constant rate", "decay over the last 20 %"
SMOOTHED = "mean of its last 8 losses"

Weights = dict[str, Tensor]


class Averages:
    """Snapshots at every tenth step, and exponential averages at every step."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.snapshots: dict[int, Weights] = {}
        self.ema = {half_life: self._copy() for half_life in HALF_LIVES}

    def _copy(self) -> Weights:
        return {name: value.detach().clone() for name, value in self.stack.parameters.items()}

    def update(self, step: int) -> None:
        """After ``step`` updates."""
        for half_life, shadows in self.ema.items():
            kept = 0.5 ** (1 / half_life) if step > WARM_UP else 0.0
            for name, value in self.stack.parameters.items():
                shadows[name].lerp_(value.detach(), 1 - kept)
        if step % EVERY == 0:
            self.snapshots[step] = self._copy()

    def of(self, step: int, number: int = 8, apart: int = EVERY, decay: Any = None) -> Weights:
        """Of so many snapshots up to a step."""
        steps = [step - apart * back for back in reversed(range(number))]
        weights = wsm_weights([float(each) for each in steps], decay) if decay else [1 / number] * number
        pairs = list(zip(weights, (self.snapshots[each] for each in steps), strict=True))
        return {name: sum(weight * shot[name] for weight, shot in pairs) for name in self.stack.parameters}  # type: ignore[misc]


class Evaluations:
    """The held-out losses of the last third of a run, of live weights and of averages, at every tenth step."""

    def __init__(self, stack: Stack, averages: Averages, live: str = LIVE) -> None:
        self.stack, self.averages = stack, averages
        self.recent: deque[Tensor] = deque(maxlen=8)
        kinds = (live, f"{live}, {SMOOTHED}", "EMA, half-life 25", "8 snapshots, 10 apart")
        self.losses: dict[str, list[Tensor]] = {kind: [] for kind in kinds}

    def look(self, step: int) -> None:
        """After ``step`` updates."""
        if step % EVERY:
            return
        self.recent.append(self.stack.score())
        if step > STEPS * 2 // 3:
            smoothed = torch.stack(list(self.recent)).mean(0)
            averaged = [self.stack.score(weights) for weights in (self.averages.ema[25], self.averages.of(step))]
            for each, loss in zip(self.losses.values(), (self.recent[-1], smoothed, *averaged), strict=True):
                each.append(loss)

    def noise(self, name: str) -> list[dict[str, Any]]:
        """The rows of a task."""
        return [{"task": name, "weights": kind, **_noise(torch.stack(each))} for kind, each in self.losses.items()]

    def curves(self, name: str) -> list[dict[str, Any]]:
        """Every loss of a task."""
        return [row for kind, each in self.losses.items() for row in _curve(name, kind, each)]


def _begin(name: str) -> tuple[Stack, Averages, torch.optim.Optimizer]:
    workload = replace(WORKLOADS[name], rate=best_rate(name))
    stack = Stack(workload, SEEDS, [partial(Fixed, math.inf)] * len(SEEDS), workload.rate)
    (optimizer,) = stack.optimizers.values()
    return stack, Averages(stack), optimizer


def compare() -> None:
    """Train each task once, with its branches."""
    rows, noise, curves = [], [], []
    for name in TASKS:
        stack, averages, optimizer = _begin(name)
        schedule = WSD(optimizer, ends=10 * STEPS, warmup_steps=WARM_UP)
        evaluations = Evaluations(stack, averages)
        branches = {round(end * (1 - DECAY)): end for end in (STEPS // 2, STEPS)}
        decayed: dict[int, Tensor] = {}
        for step in range(STEPS):
            if step in branches:
                decayed[branches[step]] = _decayed(stack, schedule, step, branches[step])
            stack.step(step)
            schedule.step()
            averages.update(step + 1)
            if step + 1 in branches.values():
                rows += _rows(name, step + 1, stack, averages, decayed[step + 1])
            evaluations.look(step + 1)
        noise += evaluations.noise(name)
        curves += evaluations.curves(name)
        print(*rows[-16:], *noise[-4:], sep="\n", flush=True)
        write_rows("worth_averaging", rows)
        write_rows("worth_averaging_noise", noise)
        write_rows("worth_averaging_curves", curves)
    show("Held-out loss", rows)
    show("Noise of evaluations", noise)


def compare_decay() -> None:
    """The noise of each task at a rate that falls from the warm-up on."""
    noise, curves = [], []
    for name in TASKS:
        stack, averages, optimizer = _begin(name)
        schedule = WSD(optimizer, ends=STEPS, warmup_steps=WARM_UP, decay_steps=STEPS - WARM_UP, curve="cosine")
        evaluations = Evaluations(stack, averages, "cosine")
        for step in range(STEPS):
            stack.step(step)
            schedule.step()
            averages.update(step + 1)
            evaluations.look(step + 1)
        noise += evaluations.noise(name)
        curves += evaluations.curves(name)
        print(*noise[-4:], sep="\n", flush=True)
        write_rows("worth_averaging_decay", noise)
        write_rows("worth_averaging_decay_curves", curves)
    show("Noise of evaluations at a rate that falls", noise)


def _decayed(stack: Stack, schedule: WSD, begin: int, end: int) -> Tensor:
    """The losses of the run that decays from here on; the run itself goes on untouched."""
    branch = copy.deepcopy(stack)
    (optimizer,) = branch.optimizers.values()
    falls = WSD(optimizer, ends=end, warmup_steps=WARM_UP, decay_steps=end - begin)
    falls.load_state_dict(schedule.state_dict())
    for step in range(begin, end):
        branch.step(step)
        falls.step()
    return branch.score()


def _rows(name: str, step: int, stack: Stack, averages: Averages, decayed: Tensor) -> list[dict[str, Any]]:
    arms: Mapping[str, Weights | None] = {
        LIVE: None,
        **{f"8 snapshots, {apart} apart": averages.of(step, apart=apart) for apart in (10, 20, 40)},
        "8 snapshots, 40 apart, 1-sqrt": averages.of(step, apart=40, decay="1-sqrt"),
        **{f"EMA, half-life {half_life}": shadows for half_life, shadows in averages.ema.items()},
    }
    scores = {**{arm: stack.score(weights) for arm, weights in arms.items()}, DECAYED: decayed}
    return [
        {
            "task": name,
            "steps": step,
            "weights": arm,
            "val_loss": round(float(each.mean()), 4),
            "over_decay": round(float((each - decayed).mean()), 4),
            "val_loss_by_seed": " ".join(f"{loss:.4f}" for loss in each.tolist()),
        }
        for arm, each in scores.items()
    ]


def _curve(name: str, kind: str, losses: list[Tensor]) -> list[dict[str, Any]]:
    steps = range(STEPS - EVERY * (len(losses) - 1), STEPS + 1, EVERY)
    return [
        {"task": name, "weights": kind, "step": step, "seed": seed, "val_loss": round(loss, 4)}
        for step, each in zip(steps, losses, strict=True)
        for seed, loss in zip(SEEDS, each.tolist(), strict=True)
    ]


def _noise(losses: Tensor) -> dict[str, Any]:
    """Of losses of shape (checkpoints, seeds)."""
    count = len(losses)
    line = torch.stack([torch.ones(count), torch.linspace(-1, 1, count)], 1)
    about = losses - line @ torch.linalg.lstsq(line, losses).solution
    lag = 100 // EVERY
    return {
        "checkpoints": count,
        "mean_loss": round(float(losses.mean()), 4),
        "checkpoint_sd": round(float((about.square().sum(0) / (count - 2)).sqrt().mean()), 5),
        "seed_sd": round(float(losses.std(1).mean()), 5),
        "later_is_better": round(float((losses[lag:] < losses[:-lag]).float().mean()), 3),
    }
