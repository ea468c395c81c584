"""GradES on runs that are long enough to settle: what it freezes, what that saves, and the loss.

    python -m benchmarks.grades_settling record --run "ViT, cosine" --seed 0  # train plainly, keep the figures
    python -m benchmarks.grades_settling rules                                # rules on the records, without training
    python -m benchmarks.grades_settling train --run "ViT, cosine" --seed 0   # really: plain and two defaults
    python -m benchmarks.grades_settling rows                                 # of all trainings

`rules` puts weights together from the records: each matrix as it was when a rule would have frozen it, all else as at
the end of the plain run, or everything as it was when the last had settled and training would have stopped. The others
have not adapted to what is frozen, so that the loss is, if anything, too high. Rows go to
benchmarks/results/grades_rules.csv and grades_settling.csv; the runs are those of benchmarks/grades_records.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.grades_records import LOGS, RUNS, Settling, make, record
from benchmarks.rows import publish
from harness import json_lines
from harness.runs import quiet_trainer
from lightning_eff.callbacks import GradES
from lightning_eff.functional.grades import GradESConfig, GradESState, grades_update, settled_units

OLD: dict[str, Any] = {"metric": "grad_change", "tau_mode": "relative", "tau": 0.5}

RULES: dict[str, dict[str, Any]] = {
    "grad_change, relative 0.5 (the default before)": OLD,
    "grad, remaining 0.02": {"metric": "grad", "tau": 0.02},
    "gain, remaining 0.01": {"metric": "gain", "tau": 0.01},
    "gain, remaining 0.02 (the default)": {"metric": "gain", "tau": 0.02},
    "gain, remaining 0.05": {"metric": "gain", "tau": 0.05},
    "gain, remaining 0.1": {"metric": "gain", "tau": 0.1},
}
ALPHA = 0.5

# --- on the records --------------------------------------------------------------------------------------------------


def freeze_steps(kept: dict[str, Any], steps: int, metric: str, **config: Any) -> list[int | None]:
    """The step at which the rule would have frozen each matrix, at any check."""
    figures = kept["figures"]
    values: Tensor = figures["grad"] * figures["rate"] if metric == "gain" else figures[metric]
    state = GradESState(values.shape[1], GradESConfig(**config))
    found: list[int | None] = [None] * state.units
    for step, observed in zip(kept["checks"], values, strict=True):
        grades_update(observed, state, armed=step > ALPHA * steps, done=step / steps)
        settled = settled_units(state).isfinite().nonzero().flatten().tolist()
        for unit in settled:
            found[unit] = step
        state.mark(settled)
    return found


def put_together(kept: dict[str, Any], frozen: list[int | None], module: Settling, steps: int) -> dict[str, Any]:
    """What a model with these matrices frozen has lost, and what it has saved."""
    snapshots: dict[int, dict[str, Tensor]] = kept["weights"]
    last = max(snapshots)
    at = [last if step is None else min(s for s in snapshots if s >= step) for step in frozen]
    end = last if None in frozen else max(at)
    weights = dict(snapshots[end])
    sizes = [sum(weights[name].numel() for name in names) for _, names in kept["names"]]
    for (_, names), step in zip(kept["names"], at, strict=True):
        weights |= {name: snapshots[step][name] for name in names}
    module.load_state_dict(weights)
    spared = sum(size * (end - step) for size, step in zip(sizes, at, strict=True))
    return {
        "frozen": f"{sum(step is not None for step in frozen)} of {len(frozen)}",
        "stops_at": round(end / steps, 2),
        "weight_gradients_spared": round(spared / sum(sizes) / end, 3),
        "loss": round(module.score(), 4),
    }


def rules() -> None:
    """Each rule on each record."""
    rows = []
    for number, name in enumerate(RUNS):
        for path in sorted(LOGS.glob(f"grades_record_{number}_*.pt")):
            seed = int(path.stem.rsplit("_", 1)[1])
            kept = torch.load(path, weights_only=True)
            module, steps = make(name, seed)
            plain = put_together(kept, [None] * len(kept["names"]), module, steps)["loss"]
            for rule, config in RULES.items():
                found = put_together(kept, freeze_steps(kept, steps, **config), module, steps)
                change = round(found["loss"] - plain, 4)
                rows.append({"run": name, "seed": seed, "rule": rule, **found, "plain": plain, "change": change})
    publish("Rules on the records", "grades_rules", rows)


# --- really ----------------------------------------------------------------------------------------------------------

ARMS: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "GradES()": lambda: [GradES()],
    "GradES, the default before": lambda: [GradES(**OLD)],
}


class Said(logging.Handler):
    """What GradES says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("GradES"):
            self.lines.append(record.getMessage())


def train(name: str, seed: int, arms: list[str]) -> None:
    """Some arms of one run and seed, each into a file of its own."""
    for arm in arms:
        module, steps = make(name, seed)
        logger, said = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Said()
        logger.setLevel(logging.INFO)
        logger.addHandler(said)
        logger.propagate = False
        callbacks = ARMS[arm]()
        trainer = quiet_trainer(*callbacks, accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1)
        trainer.fit(module)
        logger.removeHandler(said)
        frozen = dict(callbacks[0].frozen) if callbacks else {}
        made = trainer.global_step
        forecast, saved = (
            [_figures(line) for line in said.lines if words in line] for words in (" if rate ", " froze ")
        )
        row = {
            "run": name,
            "arm": arm,
            "seed": seed,
            "planned_steps": steps,
            "steps": made,
            "frozen": len(frozen),
            "first_frozen": min(frozen.values()) if frozen else "",
            "forecast": forecast[-1] if forecast else "",
            "saved": saved[-1] if saved else "",
            "loss": round(module.score(), 4),
        }
        print(*said.lines, row, sep="\n", flush=True)
        LOGS.mkdir(parents=True, exist_ok=True)
        path = LOGS / f"grades_settling_{list(RUNS).index(name)}_{seed}_{list(ARMS).index(arm)}.jsonl"
        path.write_text(json.dumps(row) + "\n")


def _figures(line: str) -> str:
    """Of the backward passes and of the steps, in a line that says what is saved."""
    return " and ".join(re.findall(r"[\d.]+%", line))


def rows() -> None:
    """The rows of all trainings."""
    torch.set_num_threads(1)  # as they had
    found = json_lines.read(*sorted(LOGS.glob("grades_settling_*.jsonl")))
    publish("Runs that are long enough to settle", "grades_settling", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "rules", "train", "rows"))
    parser.add_argument("--run", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    if arguments.part == "rules":
        rules()
    elif arguments.part == "rows":
        rows()
    else:
        for name in arguments.run:
            for seed in arguments.seed:
                train(name, seed, arguments.arms) if arguments.part == "train" else record(name, seed)


if __name__ == "__main__":
    main()
