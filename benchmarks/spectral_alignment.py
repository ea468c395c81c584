"""How early spectral alignment warns, how often it is wrong, and what it costs.

    python -m benchmarks.spectral_alignment record   # trains every run and records the signals of all detectors
    python -m benchmarks.spectral_alignment tune     # candidate rules on the development seeds 10 and 11
    python -m benchmarks.spectral_alignment lead     # the defaults, and tuned scalar detectors, on the seeds 6, 7 and 8
    python -m benchmarks.spectral_alignment plot     # docs/images/spectral_alignment.png
    python -m benchmarks.spectral_alignment live     # the callback itself, against what `lead` says of the records
    python -m benchmarks.spectral_alignment cost     # step time with the monitor over without, side by side

Records go to logs/spectral_alignment/, rows to benchmarks/results/spectral_alignment_<part>.csv. The default
configuration was fixed on the development seeds, before the records of the others were looked at.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpt import GPT_10M, constant, parameters, step_times, text, train
from benchmarks.rows import CONSOLE, publish, show, write_rows
from benchmarks.spectral_detectors import (
    BURN_IN,
    Rule,
    collapses,
    judge,
    leads,
    onsets,
    records,
    scalar_detectors,
    score,
)
from benchmarks.spectral_runs import EVERY, RECORDS, WORKLOADS, exploded, record
from harness.plots import IMAGES, panels, save
from harness.processes import spawned
from harness.recorders import Alarms
from harness.runs import begin, quiet_lightning
from harness.timing import in_turn, over
from lightning_eff.callbacks import SpectralAlignmentMonitor
from lightning_eff.functional.spectral_alignment import CollapseConfig

DEVELOPMENT, HELD_OUT = (10, 11), (6, 7, 8)
MECHANISMS = [name for name, workload in WORKLOADS.items() if workload.diverges]


def tune() -> None:
    """Rules without a false alarm on the development seeds, the best first, and how the defaults do among them."""
    runs = records(DEVELOPMENT)
    rows = []
    grid = itertools.product((10, 20), (0.98, 0.99), (0.15, 0.25), (2, 3), (5, 10, 12, 14, 16), (0.3, 0.5))
    for every, threshold, hysteresis, patience, look_back, residual in grid:
        config = CollapseConfig(threshold, hysteresis, patience, look_back)
        shares = [collapses(run, Rule(every, config, residual, 1.0))[0] for run in runs]
        for severity in (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5):
            alarms = [onsets(share, severity, every) for share in shares]
            false, found = leads(runs, alarms)
            rows.append(
                dict(every=every, threshold=threshold, hysteresis=hysteresis, patience=patience, look_back=look_back,
                     residual=residual, severity=severity, false_alarms=false, warned=score(found)[0],
                     lead=score(found)[1], default=Rule(every, config, residual, severity) == Rule.default())
            )  # fmt: skip
    rows.sort(key=lambda row: (row["false_alarms"], -row["warned"], -row["lead"]))
    show("Rules on the development seeds", rows[:30] + [row for row in rows[30:] if row["default"]])
    CONSOLE.print(write_rows("spectral_alignment_tune", rows))


def tuned_detectors() -> dict[str, tuple[str, float, Callable[[dict[str, Any]], list[float]]]]:
    """Of each scalar detector the variant and threshold that do best on the development seeds without a false alarm."""
    runs = records(DEVELOPMENT)
    best: dict[str, tuple[tuple[int, int], tuple[str, float, Callable[[dict[str, Any]], list[float]]]]] = {}
    for name, variant, signal in scalar_detectors():
        signals = [signal(run) for run in runs]
        healthy = [
            max((v for v in values[BURN_IN : None if not w.diverges else max(w.fault_at, BURN_IN)]), default=-math.inf)
            for values, w in zip(signals, (WORKLOADS[run["workload"]] for run in runs), strict=True)
        ]
        threshold = math.nextafter(max(healthy), math.inf)
        false, found = leads(runs, [onsets(values, threshold) for values in signals])
        assert false == 0, (name, variant, false)
        if name not in best or score(found) > best[name][0]:
            best[name] = score(found), (variant, threshold, signal)
    return {name: choice for name, (_, choice) in best.items()}


def lead() -> None:
    """Everything on the held-out seeds."""
    runs, rule = records(HELD_OUT), Rule.default()
    detectors: dict[str, tuple[str, list[list[int]]]] = {
        "spectral alignment": (
            "defaults", [onsets(collapses(run, rule)[0], rule.severity, rule.every_n_steps) for run in runs]
        )
    }  # fmt: skip
    for name, (variant, threshold, signal) in tuned_detectors().items():
        detectors[name] = f"{variant}, {threshold:.3g}", [onsets(signal(run), threshold) for run in runs]
    rows, false_rows = [], []
    for name, (setting, alarms) in detectors.items():
        for run, steps in zip(runs, alarms, strict=True):
            healthy, false, first, end = judge(run, steps)
            about = dict(detector=name, setting=setting, run=run["workload"], seed=run["seed"])
            if WORKLOADS[run["workload"]].diverges:
                fault = WORKLOADS[run["workload"]].fault_at
                warning = end - first if first is not None and end is not None else 0
                rows.append(about | dict(fault_at=fault, diverged_at=end, first_alarm=first, steps_of_warning=warning))
            if healthy:
                rate = round(1000 * false / healthy, 3)
                false_rows.append(about | dict(healthy_steps=healthy, false_alarms=false, per_1000_steps=rate))
    for mechanism in MECHANISMS:
        table = []
        for name in detectors:
            mine = [row for row in rows if row["run"] == mechanism and row["detector"] == name]
            table.append(dict(detector=name, steps_of_warning=[row["steps_of_warning"] for row in mine],
                              diverged_at=[row["diverged_at"] for row in mine]))  # fmt: skip
        show(f"Steps of warning, {mechanism}", table)
    table = []
    for name in detectors:
        mine = [row for row in false_rows if row["detector"] == name]
        total, false = sum(row["healthy_steps"] for row in mine), sum(row["false_alarms"] for row in mine)
        table.append(
            dict(detector=name, healthy_steps=total, false_alarms=false, per_1000=round(1000 * false / total, 2))
        )
    show("False alarms on held-out seeds", table)
    CONSOLE.print(write_rows("spectral_alignment_lead", rows))
    CONSOLE.print(write_rows("spectral_alignment_false_alarms", false_rows))
    CONSOLE.print(write_rows("spectral_alignment_layers", leading_layers(runs, rule)))


def leading_layers(runs: Sequence[dict[str, Any]], rule: Rule) -> list[dict[str, Any]]:
    """Mean majority of each kind of layer, and which layers had collapsed at the first alarm.

    Of a run that diverges in the 50 steps before the fault, from 100 to 50 and from 50 to 0 steps before the
    divergence; of a healthy one in its last 50 steps.
    """
    rows = []
    for run in runs:
        workload, losses = WORKLOADS[run["workload"]], run["scalars"]["loss"]
        shares, names = collapses(run, rule)
        first = judge(run, onsets(shares, rule.severity, rule.every_n_steps))[2]
        at_alarm = "" if first is None else " ".join(names[first // rule.every_n_steps])
        end = exploded(losses.tolist()) if workload.diverges else None
        spans = {"before_fault": workload.fault_at} if workload.fault_at else {}
        spans |= {"last_50": len(losses)} if end is None else {"100_to_50_before": end - 50, "last_50": end}
        kinds = [name.rpartition(".")[2] for name in run["layers"]]
        if run["workload"].startswith("healthy: digits"):
            kinds = ["linear"] * len(kinds)
        for kind in dict.fromkeys(kinds):
            mine = run["majority"][str(EVERY)][:, [i for i, other in enumerate(kinds) if other == kind]]
            means = {
                name: round(mine[(to - 50) // EVERY : to // EVERY].nanmean().item(), 3) if to >= 50 else None
                for name, to in spans.items()
            }
            about = dict(run=run["workload"], seed=run["seed"], diverged_at=end, kind=kind)
            columns = dict.fromkeys(("before_fault", "100_to_50_before", "last_50"))
            rows.append(about | columns | means | dict(collapsed_at_alarm=at_alarm))
    return rows


# --- pictures --------------------------------------------------------------------------------------------------------


def plot(seed: int = HELD_OUT[0]) -> None:
    """Loss, share of collapsed layers and first alarms of one held-out seed, a panel for each mechanism."""
    rule, detectors = Rule.default(), tuned_detectors()
    runs = [run for run in records([seed]) if run["workload"] in (*MECHANISMS, "healthy: GPT, rate 3e-3")]
    figure, axes = panels(len(runs), 3.4, 3.6, sharey=True)
    for axis, run in zip(axes, runs, strict=True):
        losses = run["scalars"]["loss"]
        smooth = losses.unfold(0, 10, 1).mean(-1)
        axis.plot(range(9, len(losses)), smooth, color="black", linewidth=1.2, label="loss, mean of 10 steps")
        shares, _ = collapses(run, rule)
        steps = [i * rule.every_n_steps for i in range(len(shares))]
        right = axis.twinx()
        right.fill_between(steps, shares, step="post", alpha=0.25, color="tab:red")
        right.set_ylim(0, 1)
        right.set_yticks([0, 0.5, 1])
        right.set_ylabel("armed layers collapsed" if run is runs[-1] else "", color="tab:red")
        alarms = {"spectral alignment": onsets(shares, rule.severity, rule.every_n_steps)}
        alarms |= {name: onsets(signal(run), limit) for name, (_, limit, signal) in detectors.items()}
        for number, (name, found) in enumerate(alarms.items()):
            colour = f"C{(3, 0, 1, 2, 4)[number]}"
            width = 3.5 - 0.6 * number  # thin on thick, so that lines at one step are all seen
            axis.axvline(found[0] if found else math.nan, color=colour, linewidth=width, label=name)
        axis.set_title(f"{run['workload']}, seed {run['seed']}", fontsize=10)
        axis.set_xlabel("step")
    axes[0].set_ylabel("training loss, nats a byte")
    axes[0].legend(fontsize=7, loc="upper center")
    CONSOLE.print(save(figure, IMAGES / "spectral_alignment.png"))


# --- the callback itself ---------------------------------------------------------------------------------------------


def live(name: str = "rate ramp") -> None:
    """Train with the callback at its defaults: it must sound where the records say."""
    rule, workload, rows = Rule.default(), WORKLOADS[name], []
    for run in (run for run in records(HELD_OUT) if run["workload"] == name):
        recorded = onsets(collapses(run, rule)[0], rule.severity, rule.every_n_steps)
        begin(run["seed"])
        alarms, (module, data) = Alarms(), workload.build(run["seed"])
        callbacks = [*workload.faults(), SpectralAlignmentMonitor(action="warn"), alarms]
        train(module, data, *callbacks, accelerator="cpu", max_steps=len(run["scalars"]["loss"]))
        sounded = [step - 1 for step in alarms.steps]  # the records count from 0
        rows.append(dict(run=name, seed=run["seed"], callback=sounded, record=recorded))
    show("Alarms of the callback, and on the records", rows)


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(rounds: int, batch_size: int) -> None:
    """Step times of the 10 M GPT: in turn with and without the monitor, over a whole interval of the default; and of a
    step that observes over the one after it, in a run where every other step does.
    """
    every = SpectralAlignmentMonitor().every_n_steps
    data, model = text(GPT_10M, batch_size), constant(GPT_10M)
    variants = {
        "without": lambda: step_times(model, data, every, warmup=2).mean,
        "with": lambda: step_times(model, data, every, SpectralAlignmentMonitor(), warmup=2).mean,
    }
    figures = in_turn(variants, rounds)
    alternating = step_times(model, data, 2 * every, SpectralAlignmentMonitor(every_n_steps=2), warmup=2).seconds
    ratios = [a / b for a, b in zip(alternating[::2], alternating[1::2], strict=True)]
    observing = statistics.median(ratios)
    rows = [
        {
            "parameters": parameters(model),
            "tokens_per_step": batch_size * GPT_10M.block_size,
            "layers": 36,
            "every_n_steps": every,
            "rounds": rounds,
            "steps_per_round": every,
            "step_ms": round(statistics.median(figures["with"]) * 1e3, 2),
            **over(figures, "with", "without", "over_without"),
            "observing_step_over_next": round(observing, 4),
            "over_without_from_that": round(1 + (observing - 1) / every, 4),
        }
    ]
    publish("Cost of the monitor: step time, side by side", "spectral_alignment_cost", rows)


def record_all(workers: int, seeds: Sequence[int]) -> None:
    """Train what is not recorded yet."""
    todo = [(n, s) for s in seeds for n in WORKLOADS if not (RECORDS / f"{n}-{s}.pt").exists()]
    with spawned(workers) as pool:
        for path in pool.map(_record, todo):
            CONSOLE.print(path)


def _record(what: tuple[str, int]) -> Any:
    name, seed = what  # by name, since a workload's own functions do not go to another process
    return record(WORKLOADS[name], seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "tune", "lead", "plot", "live", "cost"))
    parser.add_argument("--workers", type=int, default=2, help="record: runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*DEVELOPMENT, *HELD_OUT], help="record: which seeds")
    parser.add_argument("--batch-size", type=int, default=2, help="cost: sequences of 256 bytes a step")
    parser.add_argument("--rounds", type=int, default=5, help="cost: how often each variant is measured")
    arguments = parser.parse_args()
    quiet_lightning()
    if arguments.part == "record":
        record_all(arguments.workers, arguments.seeds)
    elif arguments.part == "cost":
        cost(arguments.rounds, arguments.batch_size)
    else:
        {"tune": tune, "lead": lead, "plot": plot, "live": live}[arguments.part]()


if __name__ == "__main__":
    main()
