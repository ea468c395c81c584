"""The loss through kills, by the clock: `ddp_ft`, which goes on, beside `ddp`, which is started again at once.

    python -m benchmarks.fault_tolerance_curves

Three replicas of the 0.85 M GPT on this machine; at the same steps `kill -9` takes one of them. `ddp` saves every ten
steps. Rows: every step that the first replica makes, and every kill, by the seconds since the first step.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from benchmarks.fault_tolerance_runs import CORES, SMALL, Run, launched
from benchmarks.rows import CONSOLE, write_rows

EVERY = 10  # steps from save to save


def curve(strategy: str, steps: int, kills: list[int]) -> list[dict[str, Any]]:
    """One run, with a kill behind each of these steps."""
    settings = {} if strategy == "ddp_ft" else {"save_every": EVERY, "max_restarts": 0}
    killed: list[tuple[float, int]] = []
    with ExitStack() as stack:
        run = stack.enter_context(launched(3, strategy=strategy, steps=steps, model=SMALL, **settings))

        def at(step: int) -> bool:
            return bool(run.steps(0)) and run.steps(0)[-1]["step"] >= step

        for kill in kills:
            run.wait_for(lambda kill=kill: at(kill))
            killed.append((run.kill(1), run.steps(0)[-1]["step"]))
            if strategy == "ddp":
                run.process.wait()
                run = Run(run.folder, 3, run.settings)  # by the same line, as a queue would do it at once
                stack.callback(run.end)
            # Back at work, so that the process that is killed next is one of those that are there.
            run.wait_for(lambda run=run: run.steps(1)[-1]["time"] > killed[-1][0] + 1.0)
        run.wait_for(lambda: at(steps))
        made = run.steps(0)
    start = made[0]["time"]
    events = [("step", line["time"], line["step"], round(line["loss"], 4)) for line in made]
    events += [("kill", time, step, None) for time, step in killed]
    return [
        {
            "strategy": strategy,
            "model": "0.85M",
            "replicas": 3,
            "cores": CORES,
            "load_average": round(os.getloadavg()[0], 1),
            "event": event,
            "seconds": round(time - start, 2),
            "step": step,
            "loss": loss,
        }
        for event, time, step, loss in sorted(events, key=lambda each: each[1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kills", type=int, nargs="+", default=[36, 77], help="behind these steps")
    parser.add_argument("--strategies", nargs="+", default=["ddp_ft", "ddp"], choices=["ddp_ft", "ddp"])
    args = parser.parse_args()
    for strategy in args.strategies:
        rows = curve(strategy, args.steps, args.kills)
        CONSOLE.print(write_rows("fault_tolerance_curves", rows, key=("strategy",)))


if __name__ == "__main__":
    main()
