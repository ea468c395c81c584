"""What ddp_ft costs, how quickly a run is back after a death, and whether it stays the same run.

    python -m benchmarks.fault_tolerance steady       # no failure: a step of ddp_ft against one of ddp, in turn
    python -m benchmarks.fault_tolerance recovery     # 20 times kill -9, by phase of the step: until the next step
    python -m benchmarks.fault_tolerance heal         # memory, bytes and CPU time of handing a state over
    python -m benchmarks.fault_tolerance restart      # the same under Lightning's ddp and torchrun
    python -m benchmarks.fault_tolerance alarms       # is anybody taken for dead who lives?
    python -m benchmarks.fault_tolerance consistency  # the loss curve with kills against the one without
    python -m benchmarks.fault_tolerance soak         # 200 steps under random kills

Rows go to benchmarks/results/fault_tolerance_<part>.csv. The replicas run benchmarks.fault_tolerance_worker.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from contextlib import suppress
from itertools import pairwise
from typing import Any

from benchmarks.fault_tolerance_heal import heal
from benchmarks.fault_tolerance_runs import CORES, MIDDLE, SMALL, TINY, launched, medians
from benchmarks.fault_tolerance_worker import PHASES
from benchmarks.rows import CONSOLE, publish, show, write_rows
from harness.timing import in_turn, ratio

# --- (1) steady cost ------------------------------------------------------------------------------------------------


def steady(rounds: int, steps: int, models: list[str]) -> None:
    rows = []
    for name, replicas in [(name, 2) for name in models] + [("0.85M", 4)]:
        model, batch_size = (SMALL, 16 // replicas) if name == "0.85M" else (MIDDLE, 2)
        more = "ddp_ft, 2 processes each" if replicas > 2 else "ddp_ft, manual optimization"
        arms = {"ddp": replicas, "ddp_ft": replicas, more: 2}

        def step_of(arm: str, model: Any = model, batch_size: int = batch_size, arms: dict[str, int] = arms) -> float:
            settings = {"strategy": arm.partition(",")[0], "processes": 2 if "processes" in arm else 1}
            settings["manual"] = "manual" in arm
            with launched(arms[arm], model=model, batch_size=batch_size, steps=steps, **settings) as run:
                run.wait_for(lambda: run.process.poll() is not None or len(run.steps(0)) == steps, limit=400.0)
                times = [line["time"] for line in run.steps(0)]
            return statistics.median(b - a for a, b in pairwise(times[4:]))

        figures = in_turn({arm: lambda arm=arm: step_of(arm) for arm in arms}, rounds)
        row = {"model": name, "cores": CORES}
        for arm, seconds in figures.items():
            about = {"strategy": arm, "replicas": arms[arm], "quantity": "step_seconds"}
            rows.append({**row, **about, **medians(seconds)})
        for arm in list(arms)[1:]:
            middle, low, high = (round(value, 4) for value in ratio(figures, arm, "ddp"))
            about = {"strategy": f"{arm} / ddp", "replicas": arms[arm], "quantity": "ratio"}
            rows.append({**row, **about, "median": middle, "least": low, "most": high, "repeats": rounds})
    publish("A step without failures", "fault_tolerance_steady", rows)


# --- (2) recovery ---------------------------------------------------------------------------------------------------


def recovery(kills: int, name: str) -> None:
    """Kills of replicas 1 and 2 in turn, in each phase of a step; what replica 0 sees of it."""
    model = {"0.03M": TINY, "0.85M": SMALL, "10.8M": MIDDLE}[name]
    quantities: dict[tuple[str, str], list[float]] = {}

    def note(quantity: str, value: float) -> None:
        quantities.setdefault(("ddp_ft", quantity), []).append(value)

    with launched(3, strategy="ddp_ft", steps=1_000_000, model=model) as run:
        for kill in range(kills):
            phase, victim = PHASES[kill % len(PHASES)], 1 + kill // len(PHASES) % 2
            at = len(run.steps(0))
            run.wait_for(lambda at=at: len(run.steps(0)) >= at + 15 and run.steps(0)[-1]["members"] == [0, 1, 2])
            usual = [line["time"] for line in run.steps(0)][-12:]
            usual_step = statistics.median(b - a for a, b in pairwise(usual))
            killed = run.kill_in(phase, victim)

            def without(killed: float = killed, victim: int = victim) -> dict[str, Any] | None:
                steps = (line for line in run.steps(0) if line["time"] > killed)
                return next((line for line in steps if victim not in line["members"]), None)

            run.wait_for(lambda without=without: without() is not None)
            after = without()
            assert after is not None
            asked, answered = after["quorum"]
            note("kill_to_commit", after["time"] - killed)
            note(f"kill_to_commit, killed in {phase}", after["time"] - killed)
            note("kill_to_noticed", asked - killed)
            note("noticed_to_quorum", answered - asked)
            note("quorum_to_commit", after["time"] - answered)
            note("usual_step", usual_step)
            run.wait_for(lambda killed=killed, victim=victim: run.steps(victim)[-1]["time"] > killed + 1.0)
            start = [line for line in run.lines(victim) if line["event"] == "start"][-1]["time"]
            first = next(line for line in run.steps(victim) if line["time"] > start)
            note("kill_to_new_process_in_python", start - killed)
            note("restart_to_participation", first["time"] - start)
            others = run.steps(0)
            place = [line["step"] for line in others].index(first["step"])
            stall = others[place]["time"] - others[place - 1]["time"]
            note("heal_stall", stall - usual_step)
            made = {line["step"] for line in run.steps(0)}
            note("steps_lost", float(len(set(range(1, after["step"] + 1)) - made)))
            show(f"After {kill + 1} kills of one of three replicas (seconds)", _write_recovery(quantities, name))


def alarms(steps: int) -> None:
    """Changes of membership and failed steps where nobody has died, on this machine as busy as it is."""
    with launched(3, strategy="ddp_ft", steps=steps, model=TINY) as run:
        run.wait_for(lambda: any(line["event"] == "end" for line in run.lines()), limit=3600.0)
        lines = run.steps(0)
    alike = [line for line in lines if line["members"] == [0, 1, 2]]
    row = {
        "replicas": 3,
        "cores": CORES,
        "steps": len(lines),
        "steps_with_all": len(alike),
        "aborts": lines[-1]["aborts"],
        "load_average": round(os.getloadavg()[1], 1),
    }
    show("False alarms", [row])
    CONSOLE.print(write_rows("fault_tolerance_alarms", [row]))


def restart(repeats: int) -> None:
    """The same kill under Lightning's ddp and torchrun, with a checkpoint every 10 steps."""
    quantities: dict[tuple[str, str], list[float]] = {}

    def note(quantity: str, value: float) -> None:
        quantities.setdefault(("ddp, restart", quantity), []).append(value)

    every, failures = 10, 0
    while len(quantities.get(("ddp, restart", "kill_to_commit"), [])) < repeats:
        try:
            with launched(3, strategy="ddp", steps=1_000_000, save_every=every) as run:
                run.wait_for(lambda: len(run.steps(0)) >= 2 * every + every // 2)
                reached = run.steps(0)[-1]["step"]
                killed = run.kill(1)
                run.wait_for(lambda killed=killed: any(line["time"] > killed + 1.0 for line in run.steps(0)))
                first = next(line for line in run.steps(0) if line["time"] > killed + 1.0)
                run.wait_for(
                    lambda killed=killed, reached=reached: any(
                        line["time"] > killed + 1.0 and line["step"] > reached for line in run.steps(0)
                    )
                )
                again = next(line for line in run.steps(0) if line["time"] > killed + 1.0 and line["step"] > reached)
        except RuntimeError:
            # Seen: gloo's connections are refused while the ranks start, and the next attempt never connects.
            failures += 1
            if failures == 3:
                raise
            continue
        note("kill_to_commit", first["time"] - killed)
        note("kill_to_new_progress", again["time"] - killed)
        note("steps_lost", float(reached - first["step"] + 1))
    note("runs_that_never_came_up", float(failures))
    show("After kill -9 of one of three ranks, a checkpoint every 10 steps (seconds)", _write_recovery(quantities))


def _write_recovery(quantities: dict[tuple[str, str], list[float]], model: str = "0.85M") -> list[dict[str, Any]]:
    rows = [
        {
            "part": "recovery",
            "strategy": strategy,
            "model": model,
            "replicas": 3,
            "cores": CORES,
            "load_average": round(os.getloadavg()[1], 1),
            "quantity": quantity,
            **medians(values),
        }
        for (strategy, quantity), values in quantities.items()
    ]
    CONSOLE.print(write_rows("fault_tolerance_recovery", rows, key=("strategy", "model", "quantity")))
    return rows


# --- (3) computation consistency ------------------------------------------------------------------------------------


def _curve(steps: int, kills: list[tuple[int, int]], **settings: Any) -> tuple[dict[int, float], str, int]:
    """Losses by step, a digest of the weights, and how many kills there were."""
    done = 0
    with launched(3, strategy="ddp_ft", steps=steps, dropout=0.1, accumulate=2, workers=1, **settings) as run:
        for step, replica in kills:

            def due(step: int = step) -> bool:
                lines = run.steps()
                return bool(lines) and lines[-1]["step"] >= step and len(lines[-1]["members"]) == 3

            run.wait_for(due)
            run.kill(replica)
            done += 1
        run.wait_for(lambda: sum(line["event"] == "end" for line in run.lines()) == 3, limit=400.0)
        losses: dict[int, float] = {}
        for line in run.steps():
            assert losses.setdefault(line["step"], line["loss"]) == line["loss"], "two replicas log different losses"
        ends = {line["weights"] for line in run.lines() if line["event"] == "end"}
    assert len(ends) == 1, "the replicas end with different weights"
    return losses, ends.pop(), done


def consistency(steps: int) -> None:
    kills = [(steps // 6, 1), (steps // 3, 0), (steps // 2, 2), (2 * steps // 3, 1)]
    without, _, _ = _curve(steps, [])
    again, _, _ = _curve(steps, [])
    with_kills, _, done = _curve(steps, kills)
    rows = []
    for name, other, count in (("no failure, a second run", again, 0), ("kills", with_kills, done)):
        assert sorted(other) == sorted(without) == list(range(1, steps + 1)), "a step is missing"
        differences = [abs(other[step] - without[step]) for step in without]
        relative = [abs(other[step] - without[step]) / without[step] for step in without]
        rows.append(
            {
                "run": name,
                "replicas": 3,
                "steps": steps,
                "kills": count,
                "largest_difference": f"{max(differences):.3e}",
                "largest_relative": f"{max(relative):.3e}",
                "last_loss": f"{other[steps]:.6f}",
                "last_loss_without": f"{without[steps]:.6f}",
            }
        )
    title = "Loss with kills under takeover against none (AdamW, dropout 0.1, accumulation 2, a data worker)"
    publish(title, "fault_tolerance_consistency", rows)


# --- (6) soak -------------------------------------------------------------------------------------------------------


def soak(steps: int, every: float, seed: int) -> None:
    dice = random.Random(seed)
    kills: list[tuple[float, int]] = []
    with launched(3, strategy="ddp_ft", steps=steps, dropout=0.1, accumulate=2, workers=1) as run:
        run.wait_for(lambda: bool(run.steps(0)))
        due = time.time() + dice.expovariate(1 / every)
        while not any(line["event"] == "end" for line in run.lines()):
            if run.process.poll() is not None:
                raise RuntimeError((run.folder / "output.log").read_text()[-3000:])
            if time.time() > due:
                # Replica 0 is spared, so that one process goes through all changes of membership.
                replica = dice.choice([1, 2])
                with suppress(ProcessLookupError):
                    kills.append((run.kill(replica), replica))
                due = time.time() + dice.expovariate(1 / every)
            time.sleep(0.05)
        deadline = time.time() + 90
        while run.process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        lines = run.lines()
    committed = sorted({line["step"] for line in lines if line["event"] == "step"})
    survivor = [line for line in lines if line["event"] == "step" and line["replica"] == 0]
    ends = {line["weights"] for line in lines if line["event"] == "end"}
    changes = sum(a["members"] != b["members"] for a, b in pairwise(survivor))
    quarter = len(survivor) // 4
    in_use = [line["in_use"] / 2**20 for line in survivor]
    rows = [
        {
            "replicas": 3,
            "steps": steps,
            "kills": len(kills),
            "changes_of_membership": changes,
            "steps_lost": steps - len(committed),
            "replicas_at_the_end": sum(line["event"] == "end" for line in lines),
            "weights_equal": len(ends) == 1,
            "descriptors_first_quarter": max(line["descriptors"] for line in survivor[:quarter]),
            "descriptors_last_quarter": max(line["descriptors"] for line in survivor[-quarter:]),
            "threads_first_quarter": max(line["threads"] for line in survivor[:quarter]),
            "threads_last_quarter": max(line["threads"] for line in survivor[-quarter:]),
            "megabytes_first_quarter": round(max(line["resident"] for line in survivor[:quarter]) / 2**20),
            "megabytes_last_quarter": round(max(line["resident"] for line in survivor[-quarter:]) / 2**20),
            "megabytes_in_use_first_quarter": round(statistics.median(in_use[:quarter]), 1),
            "megabytes_in_use_last_quarter": round(statistics.median(in_use[-quarter:]), 1),
            "seconds": round(lines[-1]["time"] - lines[0]["time"]),
        }
    ]
    publish("Soak: random kills of two of three replicas", "fault_tolerance_soak", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["steady", "recovery", "heal", "restart", "alarms", "consistency", "soak"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between kills, on average")
    parser.add_argument("--models", nargs="+", choices=["0.03M", "0.85M", "10.8M"], default=["0.85M", "10.8M"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.part == "steady":
        steady(args.rounds, args.steps or 24, args.models)
    elif args.part == "recovery":
        recovery(args.kills, args.models[0])
    elif args.part == "heal":
        heal()
    elif args.part == "restart":
        restart(args.rounds)
    elif args.part == "alarms":
        alarms(args.steps or 1000)
    elif args.part == "consistency":
        consistency(args.steps or 120)
    else:
        soak(args.steps or 200, args.every, args.seed)


if __name__ == "__main__":
    main()
