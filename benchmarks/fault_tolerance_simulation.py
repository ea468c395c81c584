"""MeCeFO's failure scenarios, simulated with times that were measured: how much throughput each way to go on loses.

    python -m benchmarks.fault_tolerance_simulation

What is simulated: a cluster of data-parallel replicas in lockstep. Failures are a Poisson process over the whole
cluster (one every 2 h, 1 h or 0.5 h, on whichever replica is alive), every repair takes an exponential time with a mean
of 4 h, 3 h or 2 h. The paper does not say whether its rates are per node or per cluster; per node, most of the cluster
would be dead most of the time. Between two events the rate of samples is constant, so no step needs to be simulated.

What is measured: the neighbour's step with two tasks relative to a healthy one (benchmarks/results/mecefo_cost.csv) and
the seconds from a kill to the next commit, of the stall when a replica is healed, and of a restart from a checkpoint
(benchmarks/results/fault_tolerance_recovery.csv; or they are given as arguments, and the rows say so). Both are of
small models on a CPU: the result says what these costs add up to, not what a cluster of GPUs would do.

Rows go to benchmarks/results/fault_tolerance_simulation.csv.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.rows import publish, read_rows

HOUR = 3600.0


class Scenario(NamedTuple):
    """Hours between two failures in the cluster, and of a repair, both in the mean."""

    name: str
    failure_h: float
    repair_h: float


SCENARIOS = [Scenario("low", 2, 4), Scenario("mid", 1, 3), Scenario("high", 0.5, 2)]


class Times(NamedTuple):
    """What the simulation is driven by.

    Attributes:
        step: seconds of a healthy step.
        takeover: a step with two tasks on one replica, exactly, in healthy steps.
        mecefo: the same with the cheap passes.
        heartbeat: seconds of silence after which a replica is taken for dead.
        kill_to_commit: seconds from a kill to the survivors' next commit, beyond the heartbeat timeout.
        heal: seconds that all wait while a returning replica is healed.
        restart: seconds from a kill to the first new step when all are restarted from a checkpoint.
        checkpoint: seconds between two checkpoints, for those who restart from them.
    """

    step: float
    takeover: float
    mecefo: float
    heartbeat: float
    kill_to_commit: float
    heal: float
    restart: float
    checkpoint: float


class System(NamedTuple):
    """A way to go on.

    Attributes:
        rate: samples a second, in those of the healthy cluster, with so many of so many replicas dead.
        failure: seconds in which nobody works, for each failure.
        comeback: the same for each repair.
    """

    rate: Callable[[int, int], float]
    failure: float
    comeback: float


def systems(times: Times) -> dict[str, System]:
    """All ways to go on; the first loses least."""

    def taken_over(two_tasks: float) -> Callable[[int, int], float]:
        def rate(dead: int, replicas: int) -> float:
            if dead == replicas:
                return 0.0
            tasks = math.ceil(replicas / (replicas - dead))  # of the replica that has most of them; the others wait
            return 1.0 if tasks == 1 else 1 / (1 + (two_tasks - 1) * (tasks - 1))

        return rate

    def shrunk(dead: int, replicas: int) -> float:
        return (replicas - dead) / replicas

    # A kill costs the time to notice it, to form the group anew, and on average half of the step that is lost.
    noticed = times.heartbeat + times.kill_to_commit + times.step / 2
    return {
        "mecefo": System(taken_over(times.mecefo), noticed, times.heal),
        "takeover": System(taken_over(times.takeover), noticed, times.heal),
        "shrink": System(shrunk, noticed, times.heal),
        # Everything since the last checkpoint is done again. A repaired replica is taken in at a checkpoint.
        "restart from checkpoint": System(shrunk, times.restart + times.checkpoint / 2, times.restart),
    }


def simulate(system: System, scenario: Scenario, replicas: int, hours: float, seed: int) -> tuple[float, float]:
    """Fraction of the healthy cluster's samples that are done, and the mean number of dead replicas."""
    chance = random.Random(seed)
    now = done = dead_time = 0.0
    dead = 0
    repairs: list[float] = []
    failure = chance.expovariate(1 / (scenario.failure_h * HOUR))
    end = hours * HOUR
    lost = 0.0  # seconds of standstill that are still to be served
    while now < end:
        until = min([failure, end, *repairs])
        span = until - now
        still = min(lost, span)
        lost -= still
        done += (span - still) * system.rate(dead, replicas)
        dead_time += span * dead
        now = until
        if now == failure:
            failure = now + chance.expovariate(1 / (scenario.failure_h * HOUR))
            if dead < replicas - 1:  # the last one is spared: a cluster without any cannot be compared
                dead += 1
                repairs.append(now + chance.expovariate(1 / (scenario.repair_h * HOUR)))
                lost += system.failure
        elif now in repairs:
            repairs.remove(now)
            dead -= 1
            lost += system.comeback
    return done / end, dead_time / end


def read_times(args: argparse.Namespace) -> tuple[Times, dict[str, Any]]:
    """The times, and what of them is measured."""
    steps = {row["variant"]: float(row["over_healthy"]) for row in read_rows("mecefo_cost")}
    recovery = {"kill_to_commit": args.kill_to_commit, "heal": args.heal, "restart": args.restart}
    source = "given"
    if None in recovery.values():
        names = (
            ("ddp_ft", "kill_to_commit_minus_heartbeat"),
            ("ddp_ft", "heal_stall"),
            ("ddp, restart", "kill_to_commit"),  # the steps since the checkpoint come on top
        )
        rows = read_rows("fault_tolerance_recovery")
        found = {(row["strategy"], row["quantity"]): float(row["median"]) for row in rows}
        measured = {key: max(0.0, found[name]) for key, name in zip(recovery, names, strict=True)}
        source = "measured" if set(recovery.values()) == {None} else "measured, but those given"
        recovery = {key: measured[key] if value is None else value for key, value in recovery.items()}
    times = Times(
        step=args.step,
        takeover=steps["takeover, two tasks"],
        mecefo=steps["mecefo, two tasks, rank 1/4"],
        heartbeat=args.heartbeat,
        checkpoint=args.checkpoint,
        **recovery,
    )
    return times, {"takeover_step": times.takeover, "mecefo_step": times.mecefo, "recovery_times": source}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 32], help="replicas of the cluster")
    parser.add_argument("--step", type=float, default=3.2, help="seconds of a healthy step")
    parser.add_argument("--heartbeat", type=float, default=5.0, help="seconds until a dead replica is noticed")
    parser.add_argument("--checkpoint", type=float, default=600.0, help="seconds between two checkpoints")
    parser.add_argument("--kill-to-commit", type=float, help="seconds beyond the heartbeat, in place of those measured")
    parser.add_argument("--heal", type=float, help="seconds that all wait for a return, in place of those measured")
    parser.add_argument("--restart", type=float, help="seconds of a restart, in place of those measured")
    parser.add_argument("--hours", type=float, default=20_000)
    args = parser.parse_args()
    times, about = read_times(args)
    rows = []
    for replicas in args.replicas:
        for scenario in SCENARIOS:
            for name, system in systems(times).items():
                fraction, dead = simulate(system, scenario, replicas, args.hours, seed=0)
                rows.append(
                    {
                        "scenario": scenario.name,
                        "failure_every_h": scenario.failure_h,
                        "repair_h": scenario.repair_h,
                        "rates": "of the cluster",
                        "replicas": replicas,
                        "system": name,
                        "throughput_lost_percent": round(100 * (1 - fraction), 2),
                        "dead_on_average": round(dead, 2),
                        "standstill_per_failure_s": round(system.failure, 1),
                        "standstill_per_return_s": round(system.comeback, 1),
                        "hours": args.hours,
                        **about,
                    }
                )
    brief = ("scenario", "replicas", "system", "throughput_lost_percent", "dead_on_average")
    publish("Throughput lost against no failure", "fault_tolerance_simulation", rows, brief)


if __name__ == "__main__":
    main()
