"""RunHealth: who is named, where and how soon; false alarms; and what an ordinary step pays.

python -m benchmarks.run_health detect   # stopped, looping, stuck in a worker, a collective left out: 20 cases
python -m benchmarks.run_health slow     # a rank throttled by a fifth, from outside, with SIGSTOP and SIGCONT
python -m benchmarks.run_health bit      # one bit of one rank's weights
python -m benchmarks.run_health soak     # 5,000 steps with validation, saves and a long batch: no alarm
python -m benchmarks.run_health cost     # process CPU time a step, with and without, in turn within one run

With ``--batch 12`` a step of the 0.85 M GPT has as many sequences, of the same length, as in nanoGPT's recipe for a
CPU; with ``--batch 16`` one of the 1 M GPT is that of examples/gpt/configs/run_health.yaml.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import show, write_rows
from benchmarks.run_health_runs import AT, BATCH, EVERY, HANG, OURS, PLAIN, SIZES, WARM, run, train
from harness.alternating import COLUMNS, cost_row
from harness.forked import ForkedRanks

PHASES = {"stop": "FaultInjector", "loop": "forward", "worker": "data", "left_out": "waiting"}


def _until(forked: ForkedRanks, pattern: str, seconds: float) -> tuple[float, re.Match[str]]:
    """When the ranks have printed something, and what."""
    deadline = time.monotonic() + seconds
    while (found := re.search(pattern, forked.text(), re.DOTALL)) is None:
        if time.monotonic() > deadline or not forked.running():
            raise RuntimeError(f"{pattern!r} did not come:\n{forked.text()}")
        time.sleep(0.01)
    return time.monotonic(), found


def detect(ranks_of: Sequence[int]) -> None:
    rows = []
    for ranks in ranks_of:
        for fault in PHASES:
            for victim in range(ranks):
                with tempfile.TemporaryDirectory() as folder:
                    settings = {"folder": folder, "size": "0.1 M", "fault": fault, "victim": victim}
                    with ForkedRanks(ranks, Path(folder), train, settings) as forked:
                        if fault == "worker":  # what comes behind step ``AT`` is the batch that does not
                            while not Path(folder, "at").exists() and forked.running():
                                time.sleep(0.01)
                            began = time.monotonic()
                        else:
                            began, _ = _until(forked, r"FAULT|FaultInjector: stop", 300)
                        end, report = _until(forked, r"\(limit ([\d.]+) s\)\.(.*?)the stacks of all ranks", 120)
                limit = float(report[1])
                named = re.findall(r"^  rank (\d+) \(host.*phase '(\w+)'", report[2], re.MULTILINE)
                rows.append(
                    {
                        "fault": fault,
                        "ranks": ranks,
                        "victim": victim,
                        "limit_s": limit,
                        "named_after_s": round(end - began, 2),
                        "beyond_limit_s": round(end - began - limit, 2),
                        "right_rank": [rank for rank, _ in named] == [str(victim)],
                        "right_phase": [phase for _, phase in named] == [PHASES[fault]],
                        "load": round(os.getloadavg()[0], 1),
                    }
                )
                print(rows[-1], flush=True)
    right = sum(row["right_rank"] and row["right_phase"] for row in rows)
    show(f"Who holds up a run: right rank and phase in {right} of {len(rows)}", rows)
    write_rows("run_health_detect", rows, key=("ranks",))


def _throttle(forked: ForkedRanks, victim: int, share: float) -> None:
    """Stop a rank for a part of every few milliseconds, from step ``AT`` on, until all have ended."""
    while not (forked.folder / "at").exists() and forked.running():
        time.sleep(0.01)
    period = 0.012
    while len(forked.running()) == len(forked.pids):
        os.kill(forked.pids[victim], signal.SIGSTOP)
        time.sleep(period * share / (1 + share))
        os.kill(forked.pids[victim], signal.SIGCONT)
        time.sleep(period / (1 + share))


def _who(rank: int | None) -> str:
    return "the network" if rank is None else f"rank {rank}"


def _words(findings: Sequence[Any]) -> str:
    """Who was named, when and by how much."""
    return "; ".join(f"{_who(one['rank'])} by {one['slower']:.2f} at step {step}" for step, one in findings)


def slow(steps: int, repeats: int, batch: int) -> None:
    rows = []
    for victim in (0, 1) * repeats:
        settings = {"size": "0.85 M", "batch": batch, "trainer": {"max_steps": steps}}
        found = run(2, lambda forked, v=victim: _throttle(forked, v, 0.2), **settings)
        first = next(((step, one) for step, one in found[0]["findings"] if one["rank"] == victim), None)
        others = [(step, one) for step, one in found[0]["findings"] if one["rank"] != victim]
        rows.append(
            {
                "ranks": 2,
                "victim": victim,
                "throttled_by": 0.2,
                "named_after_steps": None if first is None else first[0] - AT,
                "slower": None if first is None else round(first[1]["slower"], 3),
                "phase": None if first is None else first[1]["phase"],
                "sequences": batch,
                "ms_a_step": round(1000 * found[0]["seconds"]),
                "steps": steps,
                "others_named": _words(others),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    show("A rank throttled by a fifth", rows)
    write_rows("run_health_slow", rows)


def bit() -> None:
    rows = []
    for ranks in (2, 3):
        for victim in range(ranks):
            health = {"every_n_steps": 5, "weights_every_n_steps": 10, "slow": None}
            found = run(
                ranks, size="0.1 M", fault="corrupt", victim=victim, health=health, trainer={"max_steps": AT + 60}
            )
            found = [rank["differences"] for rank in found]
            step, rank, name = found[0][0]
            rows.append(
                {
                    "ranks": ranks,
                    "victim": victim,
                    "weights_every_n_steps": 10,
                    "found_after_steps": step - AT,
                    "right_rank": rank == victim or ranks == 2,
                    "parameter": name,
                    "same_on_all_ranks": all(one == found[0] for one in found),
                }
            )
    show("One bit of one rank's weights", rows)
    write_rows("run_health_bit", rows)


def soak(steps: int, beside: int) -> None:
    trainer = {"max_steps": steps, "limit_val_batches": 5, "val_check_interval": 250}
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burn) for _ in range(beside)]
    try:
        found = run(2, size="0.1 M", saves=500, long_batch=steps // 2, trainer=trainer)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    row = {
        "ranks": 2,
        "steps": steps,
        "busy_processes_beside": beside,
        "hang_seconds": HANG,
        "hangs_reported": max(rank["verdicts"] for rank in found),
        "slow_reported": len(found[0]["findings"]),
        "which": _words(found[0]["findings"]),
        "differences_reported": len(found[0]["differences"]),
        "ms_a_step": round(1000 * found[0]["seconds"], 1),
        "load": round(os.getloadavg()[0], 1),
    }
    show("False alarms", [row])
    write_rows("run_health_soak", [row], key=("steps", "busy_processes_beside"))


def cost(size: str, rounds: int, batch: int) -> None:
    """Process CPU time of a step, of both ranks: of the hooks, of the thread, and of what is due once in 990 steps.

    The thread costs what it does in a second; a step takes as long as its CPU time where there is no other work.
    """
    trainer = {"max_steps": WARM + EVERY // 2 + 2 * EVERY * rounds, "log_every_n_steps": 10**9}
    found = run(2, size=size, batch=batch, turns=True, trainer=trainer, health={"hang_seconds": 30.0})
    hooks = cost_row(found, OURS, PLAIN)
    weights = 1e6 * max(rank["hash_seconds"] for rank in found) / 990
    watchdog = 1e6 * max(rank["watchdog"] for rank in found)  # in a second
    beside = weights + watchdog * hooks["cpu_ms_a_step"] / 1000
    step = 1000 * hooks["cpu_ms_a_step"]
    row = {
        "size": size,
        "run": OURS,
        "over": PLAIN,
        "ranks": 2,
        "sequences": batch,
        "steps_in_a_block": EVERY,
        **hooks,
        "weights_us_a_step": round(weights, 1),
        "watchdog_us_a_second": round(watchdog, 1),
        **{f"in_all{end}": round(1 + (hooks[f"cpu_us_more{end}"] + beside) / step, 4) for end in ("", "_low", "_high")},
        "load": round(os.getloadavg()[0], 1),
    }
    show(f"An ordinary step, {size}", [row], ["size", *COLUMNS, "watchdog_us_a_second", "in_all"])
    write_rows("run_health_cost", [row], key=("size", "sequences", "run"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["detect", "slow", "bit", "soak", "cost"])
    parser.add_argument("--size", choices=list(SIZES), default="0.85 M")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="of detect")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences a rank, of slow and cost")
    parser.add_argument("--beside", type=int, default=0, help="processes that keep a core busy beside the soak")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if arguments.what == "slow":
        slow(arguments.steps or 130, 3, arguments.batch)
    elif arguments.what == "soak":
        soak(arguments.steps or 5000, arguments.beside)
    elif arguments.what == "cost":
        cost(arguments.size, arguments.rounds, arguments.batch)
    elif arguments.what == "detect":
        detect(arguments.ranks)
    else:
        bit()
