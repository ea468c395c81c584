"""How far ahead the rules of TrainingGuard warn of a divergence, how often they are wrong, and what they cost.

    python -m benchmarks.detectors record --seeds 100  # train, and record what the rules look at
    python -m benchmarks.detectors lead --seeds 100    # ask the rules, on what is recorded
    python -m benchmarks.detectors rescue              # runs that diverge, with the guard and without
    python -m benchmarks.detectors cost                # step time with the rules over without

Rows go to benchmarks/results/detectors_<part>.csv.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import lightning as L
import torch

from benchmarks.detector_runs import FAULT, RECORDS, STEPS, WORKLOADS, record
from benchmarks.gpt import GPT_1M, constant, parameters, step_times, text, train
from benchmarks.rows import CONSOLE, publish, write_rows
from benchmarks.spectral_runs import exploded
from harness.recorders import Losses
from harness.runs import begin, quiet_lightning
from harness.timing import in_turn, over
from lightning_eff.callbacks import (
    AlarmRule,
    AttentionLogits,
    ExplodingLoss,
    NonFiniteLoss,
    TrainingDivergedError,
    TrainingGuard,
    WeightGrowth,
)
from lightning_eff.callbacks.training_guard.growth import default_rules
from lightning_eff.callbacks.training_guard.rate_history import RateHistory

READ = 10  # TrainingGuard's default: an alarm is heard in the step after the next multiple of it
DETECTORS: dict[str, Callable[[], list[AlarmRule]]] = {
    "loss": lambda: [NonFiniteLoss(), ExplodingLoss()],
    "weight growth": lambda: [WeightGrowth()],
    "attention logits": lambda: [AttentionLogits()],
    "combined": default_rules,
}


def recorded() -> list[AlarmRule]:
    """The rules whose numbers are recorded beside the loss."""
    return [WeightGrowth(), AttentionLogits(required=False)]


def alarms(run: dict[str, Any], rules: Sequence[AlarmRule]) -> list[tuple[int, str]]:
    """The steps at which a guard with these rules hears the first of each row of alarms, and of which rule."""
    signals, rates = run["signals"], RateHistory()
    found: list[tuple[int, str]] = []
    last: dict[str, int] = {}
    for i, rate in enumerate(signals["rate"].tolist()):
        announced = WORKLOADS[run["workload"]].data_changes and i == STEPS // 2
        if rates.warms_again(rate) or announced:
            for rule in rules:
                rule.begin_anew()
        for rule in rules:
            value = signals[rule.name if rule.name in signals else "loss"][i].item()
            if rule.name in signals and math.isnan(value):
                continue  # it was not looked at
            if rule.judge(i + 1, value) is not None:
                if i + 1 > last.get(rule.name, -STEPS) + 20:
                    found.append((i // READ * READ + READ + 1, rule.name))
                last[rule.name] = i + 1
    return found


def diverged_at(run: dict[str, Any]) -> int | None:
    """The step at which the loss, as a mean of ten steps, has passed twice its minimum."""
    end = exploded(run["signals"]["loss"].tolist())
    return None if end is None or not WORKLOADS[run["workload"]].diverges else end + 1


def lead(seeds: Sequence[int], names: Sequence[str]) -> None:
    """Rows of warnings and of false alarms. Steps before a fault are healthy ones."""
    paths = [RECORDS / f"{name}-{seed}.pt" for name in names for seed in seeds]
    runs = [torch.load(path) for path in paths if path.exists()]
    missing = [path.stem for path in paths if not path.exists()]
    if missing:
        CONSOLE.print(f"not recorded, and left out: {', '.join(missing)}")
    warnings: list[dict[str, Any]] = []
    false: list[dict[str, Any]] = []
    for detector, build in DETECTORS.items():
        for run in runs:
            workload, end, steps = WORKLOADS[run["workload"]], diverged_at(run), len(run["signals"]["loss"])
            found = alarms(run, build())
            about = {"detector": detector, "run": workload.name, "seed": run["seed"]}
            healthy = workload.fault_at if workload.diverges else steps
            early = [(step, name) for step, name in found if not workload.diverges or step <= workload.fault_at]
            if healthy:
                rules = " ".join(f"{name}@{step}" for step, name in early)
                false.append({**about, "healthy_steps": healthy, "false_alarms": len(early), "which": rules})
            if workload.diverges:
                late = [(step, name) for step, name in found if step > workload.fault_at and (not end or step < end)]
                first, by = late[0] if late else ("", "")
                ahead = end - late[0][0] if end and late else 0
                warnings.append(
                    {**about, "fault_at": workload.fault_at, "diverged_at": end or "", "first_alarm": first, "rule": by,
                     "steps_of_warning": ahead}
                )  # fmt: skip
    publish("Steps of warning", "detectors_lead", warnings)
    write_rows("detectors_false_alarms", false)
    totals = [
        {
            "detector": detector,
            "diverged": sum(row["diverged_at"] != "" for row in warnings if row["detector"] == detector),
            "warned": sum(row["steps_of_warning"] > 0 for row in warnings if row["detector"] == detector),
            "warned_30_ahead": sum(row["steps_of_warning"] >= 30 for row in warnings if row["detector"] == detector),
            "healthy_steps": sum(row["healthy_steps"] for row in false if row["detector"] == detector),
            "false_alarms": sum(row["false_alarms"] for row in false if row["detector"] == detector),
        }
        for detector in DETECTORS
    ]
    publish("Together", "detectors_total", totals)


# --- rescue ----------------------------------------------------------------------------------------------------------


def rescue(seeds: Sequence[int], names: Sequence[str]) -> None:
    """Each run without a guard and with one whose rollback takes a tenth of the rate to the end."""
    logging.getLogger("lightning_eff").setLevel(logging.ERROR)
    short: dict[str, Any] = dict(every_n_steps=20, margin=40, keep=4, lr_factor=0.1, lr_steps=None, max_rollbacks=5)
    guards: dict[str, Callable[[], list[L.Callback]]] = {
        "none": list,
        "loss rules": lambda: [TrainingGuard(**short)],
        "default rules": lambda: [TrainingGuard(rules="default", **short)],
    }
    for name in names:
        for seed in seeds:
            for kind, build in guards.items():
                begin(seed)
                module, data = WORKLOADS[name].build(seed)
                losses, guard = Losses(), build()
                with suppress(TrainingDivergedError):
                    train(
                        module,
                        data,
                        losses,
                        *WORKLOADS[name].faults(),
                        *guard,
                        accelerator="cpu",
                        max_steps=STEPS + 100,
                    )
                values = losses.values
                row = {
                    "run": name,
                    "seed": seed,
                    "guard": kind,
                    "diverged_at": exploded(values) or "",
                    "highest_mean_of_10": round(max(_means(values)[FAULT:]), 3),
                    "loss_before_fault": round(statistics.fmean(values[FAULT - 20 : FAULT]), 3),
                    "loss_of_last_20": round(statistics.fmean(values[-20:]), 3),
                    "rollbacks": sum(g.rollbacks for g in guard if isinstance(g, TrainingGuard)),
                    "undone_steps": sum(g.undone_steps for g in guard if isinstance(g, TrainingGuard)),
                }
                CONSOLE.print(row)
                write_rows("detectors_rescue", [row], ("run", "seed", "guard"))


def _means(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(rounds: int, steps: int) -> None:
    """Mean step time of the 1 M GPT with the loss rules and with the default ones, over that without a guard."""
    data, model = text(GPT_1M, 4), constant(GPT_1M)
    variants: dict[str, Callable[[], list[L.Callback]]] = {
        "none": list,
        "loss rules": lambda: [TrainingGuard("warn")],
        "default rules": lambda: [TrainingGuard("warn", rules="default")],
    }
    timed = {name: lambda some=some: step_times(model, data, steps, *some()).mean for name, some in variants.items()}
    figures = in_turn(timed, rounds)
    rows = [
        {
            "parameters": parameters(model),
            "tokens_per_step": 4 * GPT_1M.block_size,
            "rules": name,
            "rounds": rounds,
            "steps_per_round": steps,
            "step_ms": round(statistics.median(figures[name]) * 1e3, 2),
            **over(figures, name, "none", "over_none"),
        }
        for name in variants
    ]
    publish("Cost of the rules", "detectors_cost", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "lead", "rescue", "cost"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--runs", nargs="+", default=list(WORKLOADS), help="names of runs, or words in them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="cost: steps a round; a look is in every tenth")
    arguments = parser.parse_args()
    quiet_lightning()
    names = [name for name in WORKLOADS if any(word in name for word in arguments.runs)]
    if arguments.part == "record":
        for name in names:
            for seed in arguments.seeds:
                run = record(WORKLOADS[name], seed, recorded())
                CONSOLE.print(f"{name}, seed {seed}: {run['seconds']:.0f} s, diverged at {diverged_at(run)}")
    elif arguments.part == "lead":
        lead(arguments.seeds, names)
    elif arguments.part == "rescue":
        rescue(arguments.seeds, names)
    else:
        cost(arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
