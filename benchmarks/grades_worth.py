"""What GradES is worth in fine-tuning: time to the end, and validation loss, beside plain training and EarlyStopping.

    python -m benchmarks.grades_worth train --mode full|lora --seed 0  # steps and validation loss of each arm
    python -m benchmarks.grades_worth losses                           # the rows of all trainings, with their FLOPs
    python -m benchmarks.grades_worth times --mode full|lora           # step times of what was frozen, side by side

Rows go to benchmarks/results/grades_worth.csv and grades_worth_times_<mode>.csv. Losses may be taken on a busy machine,
times not: so the runs note what was frozen when, `losses` counts the FLOPs of that, and `times` measures each of these
states and a validation side by side. A run with `--timed` had a core for itself, and its row has the seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.fine_tuning import PartOfLibrary, tuned_module
from benchmarks.gpt import step_times, train, validation_loss
from benchmarks.rows import CONSOLE, publish
from harness import json_lines
from harness.runs import begin, quiet_lightning
from harness.timing import in_turn, now, ratio, seconds_of
from lightning_eff.callbacks import GradES
from lightning_eff.structure.flops import backward_flops

LOGS = Path("logs") / "benchmarks"
VALIDATE_EVERY = 20
STEPS = 200
PATIENCE = 3  # of EarlyStopping, in validations


class Watched(GradES):
    """Also notes the lowest metric over its level after the grace period: what tau would have frozen anything."""

    lowest = float("inf")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._fit is not None
        assert self._fit.watch.map is not None
        late = [step > self.alpha * trainer.max_steps for step in self._fit.watch.map.steps]
        values = self._fit.watch.map.values()[:, torch.tensor(late)]
        self.lowest = float(values[values.isfinite()].min())


ARMS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "GradES, tau 0.95": lambda: [Watched(metric="grad_change", tau_mode="relative", tau=0.95, heat_map=True)],
    "GradES, weight_change": lambda: [Watched(metric="weight_change", tau_mode="relative", tau=0.5, heat_map=True)],
    "GradES()": lambda: [Watched(heat_map=True)],
}
RATES = {"full": 1e-3, "lora": 5e-3}
RANKS = {"full": 0, "lora": 8}


class Curve(Callback):
    """Validation loss along a run, and the clock."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.clock: list[tuple[float, float]] = []  # begin and end of each validation
        self.begin = self.end = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begin = now()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validation = now()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))
        self.clock.append((self.validation, now()))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.end = now()

    @property
    def seconds(self) -> float:
        """Of training, without validations."""
        return self.end - self.begin - sum(end - begin for begin, end in self.clock)


def tune(mode: str, arm: str, seed: int, steps: int, timed: bool) -> Iterator[dict[str, Any]]:
    """One fine-tuning: its row; the plain one also gives the row of EarlyStopping, which is a part of the same run."""
    begin(seed)
    module = tuned_module(RANKS[mode], RATES[mode], seed)
    data = PartOfLibrary(graphical=True, seed=seed)
    curve, callbacks = Curve(), ARMS[arm]()
    watched = arm == "plain"
    validates = {"val_check_interval": VALIDATE_EVERY, "limit_val_batches": 1.0} if watched else {}
    trainer = train(module, data, curve, *callbacks, max_steps=steps, gradient_clip_val=1.0, **validates)
    about = {"mode": mode, "seed": seed, "lr": RATES[mode], "planned_steps": steps}
    frozen = [dict(callback.frozen) for callback in callbacks if isinstance(callback, GradES)]
    lowest = [round(callback.lowest, 3) for callback in callbacks if isinstance(callback, Watched)]
    made = {"steps": trainer.global_step, "validations": 0}
    loss = validation_loss(module, data)
    found = {
        "val_loss": round(loss, 4),
        "lowest_metric": lowest[0] if lowest else "",
        "frozen": frozen[0] if frozen else {},
    }
    clock = {"wall_s": round(curve.seconds, 1) if timed else ""}
    yield {**about, "arm": arm, **made, **found, **clock}
    if watched:
        stop, best = early_stop(curve.points)
        made = {"steps": stop, "validations": stop // VALIDATE_EVERY}
        found = {"val_loss": round(best, 4), "lowest_metric": "", "frozen": {}}
        clock = {"wall_s": round(curve.clock[stop // VALIDATE_EVERY - 1][1] - curve.begin, 1) if timed else ""}
        yield {**about, "arm": "EarlyStopping", **made, **found, **clock}


def early_stop(points: list[tuple[int, float]]) -> tuple[int, float]:
    """The step at which Lightning's EarlyStopping(patience=PATIENCE) would have ended the run, and its best loss."""
    best, waited = float("inf"), 0
    for step, loss in points:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited >= PATIENCE:
            return step, best
    return points[-1][0], best


def train_all(mode: str, seed: int, arms: list[str], steps: int, timed: bool) -> None:
    """Some arms of one mode and seed, each into a file of its own; with their seconds, if nothing else runs."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        rows = list(tune(mode, arm, seed, steps, timed))
        CONSOLE.print(*rows)
        path = LOGS / f"grades_worth_{mode}_{seed}_{list(ARMS).index(arm)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(mode: str) -> list[dict[str, Any]]:
    """The rows of all seeds."""
    return json_lines.read(*sorted(LOGS.glob(f"grades_worth_{mode}_*.jsonl")))


class FreezeNames(Callback):
    """Closes units by their names, a LoRA pair by that of its base weight, before the first step."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        pairs = {name.removesuffix("base.weight") for name in self.names if name.endswith("base.weight")}
        self.frozen = [
            parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and (name in self.names or any(name.startswith(pair) for pair in pairs))
        ]
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def times(mode: str, steps: int, rounds: int) -> None:
    """Time every state that `worth` has frozen against the open one, from the same weights on the same batches.

    An arm's seconds are its steps by the time of their state, and its validations by theirs: what freezing saves and
    what stopping saves, each by itself.
    """
    torch.set_num_threads(1)
    rows = []
    runs = trained(mode)
    states = {frozenset(): 0} | {state: 0 for run in runs for _, state in phases(run)}
    variants = _variants(mode, list(states), steps)
    figures = in_turn(variants, rounds)
    open_ms = statistics.median(figures["0"]) * 1e3
    relative = {state: ratio(figures, str(number), "0")[0] for number, state in enumerate(states)}
    validation = ratio(figures, "validation", "0")[0]
    for run in runs:
        made = sum(count * relative[state] for count, state in phases(run))
        planned = int(run["planned_steps"])
        total = made + int(run["validations"]) * validation
        rows.append(
            {
                **{name: run[name] for name in ("mode", "arm", "seed", "planned_steps", "steps", "validations")},
                "val_loss": run["val_loss"],
                "wall_s": run["wall_s"],
                "lowest_metric": run["lowest_metric"],
                "frozen_matrices": len(run["frozen"]),
                "step_ms": round(open_ms, 1),
                "validation_over_step": round(validation, 2),
                "seconds": round(total * open_ms / 1e3, 1),
                "speedup": round(planned / total, 3),
                "by_freezing": round(int(run["steps"]) / made, 3),
                "by_stopping": round(planned / int(run["steps"]), 3),
                "frozen": json.dumps(run["frozen"]),
            }
        )
    publish("Fine-tuning: seconds by arm", f"grades_worth_times_{mode}", rows)


def losses() -> None:
    """The trainings, and their FLOPs over those of plain training: what freezing saves and what stopping saves."""
    rows = []
    for mode in RATES:
        module = tuned_module(RANKS[mode], RATES[mode])
        for run in trained(mode):
            full, made = flops(module, frozenset()), sum(count * flops(module, state) for count, state in phases(run))
            steps = int(run["steps"])
            rows.append(
                {
                    **{name: run[name] for name in ("mode", "arm", "seed", "lr", "planned_steps", "steps")},
                    **{name: run[name] for name in ("validations", "val_loss", "lowest_metric", "wall_s")},
                    "frozen_matrices": len(run["frozen"]),
                    "flops_by_freezing": round(made / (steps * full), 4),
                    "flops_by_stopping": round(steps / int(run["planned_steps"]), 4),
                    "frozen": json.dumps(run["frozen"]),
                }
            )
    publish("Fine-tuning", "grades_worth", rows, [name for name in rows[0] if name != "frozen"])


def flops(module: L.LightningModule, frozen: frozenset[str]) -> int:
    """Of a step's products with weights, for one byte, with some units frozen."""
    freeze = FreezeNames(set(frozen))
    freeze.on_train_start(None, module)  # type: ignore[arg-type]
    layers = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    made = sum(2 * layer.weight.numel() for layer in layers) + backward_flops(module)
    freeze.on_train_end(None, module)  # type: ignore[arg-type]
    return made


def _variants(mode: str, states: list[frozenset[str]], steps: int) -> dict[str, Callable[[], float]]:
    module, data = tuned_module(RANKS[mode], RATES[mode]), PartOfLibrary(graphical=True)

    def step(state: frozenset[str]) -> float:
        return step_times(module, data, steps, FreezeNames(set(state))).median

    by_number = {str(number): lambda state=state: step(state) for number, state in enumerate(states)}
    return {**by_number, "validation": lambda: seconds_of(lambda: validation_loss(module, data))}


def phases(run: Mapping[str, Any]) -> list[tuple[int, frozenset[str]]]:
    """How many steps were made with which units frozen."""
    since: dict[str, int] = run["frozen"]
    events = sorted({0, *since.values(), int(run["steps"])})
    return [
        (end - begin, frozenset(name for name, step in since.items() if step <= begin))
        for begin, end in itertools.pairwise(events)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", "losses", "times"))
    parser.add_argument("--mode", choices=tuple(RATES), default="full")
    parser.add_argument("--steps", type=int, help="of a training, or of a timing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", action="store_true", help="nothing else runs on this core: note the seconds")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    quiet_lightning()
    if arguments.part == "train":
        train_all(arguments.mode, arguments.seed, arguments.arms, arguments.steps or STEPS, arguments.timed)
    elif arguments.part == "times":
        times(arguments.mode, arguments.steps or 5, arguments.rounds)
    else:
        losses()


if __name__ == "__main__":
    main()
