"""Everything together: is a disturbed run the run that was left alone, and what does the whole suite cost a step?

python -m benchmarks.together soak --strategy ddp --steps 2000 --save-every 20 --faults 20  # and a disk that is full
python -m benchmarks.together soak --strategy ddp_ft --faults 12
python -m benchmarks.together points --strategy fsdp2  # 20 crash points, each with a resume
python -m benchmarks.together deaths  # how far ddp_ft without one replica is from the run with it, by precision
python -m benchmarks.together cost --size 10m  # process CPU time a step, over plain Lightning; quiet
python -m benchmarks.together cost --size many  # the same of 1,000 small tensors
python -m benchmarks.together spent --size 10m --steps 100  # by callback
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from benchmarks import gpt
from benchmarks.many_tensors import Small
from benchmarks.rows import CONSOLE, show, write_rows
from benchmarks.together_faults import FAULTS, apart_by_weight, soak
from benchmarks.together_hooks import surrounded
from benchmarks.together_points import APART, POINTS, SAVE_EVERY, STEPS, crash, death, hooks, losses_apart
from benchmarks.together_runs import RANKS, SAID, Settings, usual_callbacks
from examples.gpt.model import GPTConfig
from harness.alternating import COLUMNS, Alternating, cost_row
from harness.memory import peak_resident
from harness.processes import apart
from harness.runs import begin, quiet_trainer
from harness.timing import in_turn, over
from lightning_eff.callbacks import CheckpointAveraging, TrainingGuard


def bad_batches(batches: int, rollbacks: bool) -> dict[int, float]:
    """Every sixtieth loss is NaN and every ninetieth far too large; where it is asked for, NaNs in a row too."""
    found = dict.fromkeys(range(29, batches, 60), math.nan)
    found |= dict.fromkeys(range(50, batches, 90), 300.0)
    if rollbacks:
        found |= {number + n: math.nan for number in range(120, batches, 400) for n in range(5)}
    return found


def soaks(arguments: argparse.Namespace) -> None:
    rows = []
    for strategy in arguments.strategy:
        kinds = [kind for kind in FAULTS if kind in arguments.kinds]
        faults = [kinds[n % len(kinds)] for n in range(arguments.faults)]
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                Path(folder), strategy, arguments.model, steps=arguments.steps, save_every=arguments.save_every,
                workers=arguments.workers, bad=bad_batches(2 * arguments.steps, arguments.rollbacks),
                precision=arguments.precision,
            )  # fmt: skip
            outcome = soak(settings, faults, arguments.seed)
        rows.append(
            {
                "strategy": strategy,
                "ranks": RANKS[strategy],
                "model": arguments.model,
                "precision": arguments.precision,
                "steps": arguments.steps,
                "steps_made": outcome.steps,
                "save_every": arguments.save_every,
                "workers": arguments.workers,
                "bad_batches": len(settings.bad),
                "seed": arguments.seed,
                "faults": "; ".join(f"{kind} {count}" for kind, count in sorted(outcome.faults.items())),
                "lives": outcome.lives,
                "equal_to_the_bit": not outcome.different,
                "largest_difference_of_a_weight": outcome.largest,
                "first_difference": next(iter(outcome.different), ""),
            }
        )
    columns = ("strategy", "precision", "steps_made", "faults", "lives", "equal_to_the_bit", "first_difference")
    show("A disturbed run beside one that was left alone", rows, columns)
    CONSOLE.print(write_rows("together_soak", rows, key=("strategy", "model", "precision", "steps", "workers", "seed")))


def points(arguments: argparse.Namespace) -> None:
    """Each bad batch is met by several lives."""
    rows = []
    for strategy in arguments.strategy:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                Path(folder), strategy, arguments.model, steps=STEPS, save_every=SAVE_EVERY, workers=arguments.workers,
                bad=bad_batches(2 * STEPS, False),
            )  # fmt: skip
            found = crash(settings, POINTS)
        rows.append(
            {
                **{"strategy": strategy, "ranks": RANKS[strategy], "model": arguments.model, "steps": STEPS},
                **{"save_every": SAVE_EVERY, "workers": arguments.workers, "points": len(found.points)},
                **{"hooks": hooks(found.points), "batches_made_again": found.again},
                "equal_to_the_bit": not found.different,
                "first_difference": next(iter(found.different), ""),
            }
        )
        columns = ("strategy", "model", "points", "batches_made_again", "equal_to_the_bit", "first_difference")
        show("A run that dies at points of its own choice", rows, columns)
        CONSOLE.print(write_rows("together_points", rows[-1:], key=("strategy", "model", "workers")))


PRECISIONS = ("64-true", "32-true", "bf16-mixed")


def deaths(arguments: argparse.Namespace) -> None:
    """Replicas that go on without one of them, in each precision: what is left of the difference is rounding."""
    for precision in arguments.precision:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(Path(folder), "ddp_ft", "vit", steps=arguments.steps, precision=precision)
            alone, other = death(settings)
            gaps = apart_by_weight(alone, other)
            losses = losses_apart(alone, other)
        most = max(gaps, key=lambda name: gaps[name])
        row = {
            **{"precision": precision, "steps": arguments.steps, "dies_at_batch": APART},
            "first_other_loss": next((batch for batch, gap in sorted(losses.items()) if gap), ""),
            "largest_difference_of_a_loss": max(losses.values()),
            "largest_difference_of_a_weight": gaps[most],
            "of": most,
            "without_biases_of_keys": max(gap for name, gap in gaps.items() if not name.endswith("of the keys")),
        }
        show("ddp_ft without one of three replicas, beside the run with it", [row])
        CONSOLE.print(write_rows("together_deaths", [row], key=("precision", "steps")))


WARM = 5
"""Steps of a run before the first that counts."""


class Marks(L.Callback):
    """The CPU time of the process when each batch began."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds.append(time.process_time())


def model_and_data(size: str) -> tuple[L.LightningModule, Any]:
    """What is trained."""
    config = {"10m": gpt.GPT_10M, "1m": gpt.GPT_1M, "tiny": GPTConfig(32, 2, 2, 32)}.get(size)
    if config is not None:
        return gpt.constant(config), gpt.text(config, 4)
    data = [torch.randn(1, 4)] * 10_000
    return Small(250), torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def trainer_for(folder: str, steps: int, *callbacks: L.Callback, clip: float | None = None) -> L.Trainer:
    """Of a run with one checkpoint, at its end."""
    return quiet_trainer(
        *callbacks, ModelCheckpoint(folder, every_n_train_steps=steps), accelerator="cpu", devices=1, max_steps=steps,
        log_every_n_steps=50, limit_val_batches=0, num_sanity_val_steps=0, logger=TensorBoardLogger(folder),
        default_root_dir=folder, gradient_clip_val=clip,
    )  # fmt: skip


def one_run(arm: str, size: str) -> dict[str, float]:
    """What is not of a step, of a short run in a process of its own."""
    begin(0, *SAID)
    module, data = model_and_data(size)
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = usual_callbacks() if arm == "everything" else []
        # All that they keep in a long run is there: six snapshots of weights, and three of everything, one of them new.
        sooner = {
            "CheckpointAveraging": CheckpointAveraging(every_n_steps=4),
            "TrainingGuard": TrainingGuard(every_n_steps=4, margin=2, read_every_n_steps=1),
        }
        callbacks = [sooner.get(type(each).__name__, each) for each in callbacks]
        begun = time.process_time()
        clip = 1.0 if arm == "clipping" else None  # what ZClip stands in for
        trainer_for(folder, 40 if callbacks else WARM, *callbacks, marks, clip=clip).fit(module, data)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and "events.out" not in path.name]
        size_on_disk = sum(path.stat().st_size for path in files if not path.name.endswith(("yaml", "json")))
    return {
        "cpu_of_the_start": marks.seconds[0] - begun,
        "memory": peak_resident(),
        "checkpoint": float(size_on_disk),
    }


def steps_in_turn(size: str, block: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step under each arm, in one run: two runs of the same differ by more than what is looked for.

    The callbacks are taken out of the Trainer and put back. What they leave in place without their hooks (the loader
    that ExactResume has wrapped, RunHealth's thread) is there in all arms.
    """
    begin(0, *SAID)
    module, data = model_and_data(size)
    with tempfile.TemporaryDirectory() as folder:
        ours = usual_callbacks()
        suite: list[L.Callback] = []

        def enter(trainer: Any, clip: float | None, whole: bool) -> None:
            trainer.gradient_clip_val = clip
            trainer.callbacks = suite if whole else [each for each in suite if each not in ours]

        arms = {
            "everything": partial(enter, clip=None, whole=True),
            "plain": partial(enter, clip=None, whole=False),
            "clipping": partial(enter, clip=1.0, whole=False),
        }
        alternating = Alternating(arms, block, WARM)
        trainer = trainer_for(folder, WARM + block * len(arms) * rounds + 1, *ours, alternating)
        suite = trainer.callbacks  # type: ignore[attr-defined]
        trainer.fit(module, data)
    return alternating.figures()


def cost(arguments: argparse.Namespace) -> None:
    """A step within one run, block by block; what is not of a step in runs of their own, in turn."""
    whole = apart(steps_in_turn, arguments.size, arguments.block, arguments.rounds)
    about = {"size": arguments.size, "steps_in_a_block": arguments.block}
    mean = {arm: statistics.fmean(blocks) for arm, blocks in whole["cpu"].items()}  # with what comes every 50 steps
    rows: list[dict[str, Any]] = [
        {
            **{**about, "over": arm, **cost_row([whole], "everything", arm)},
            "cpu_ratio_of_the_means": round(mean["everything"] / mean[arm], 4),
        }
        for arm in ("plain", "clipping")
    ]
    show("A step with the whole suite", rows, ("over", *COLUMNS, "cpu_ratio_of_the_means", "wall_ratio"))
    CONSOLE.print(write_rows("together_step", rows, key=("size", "over")))
    figures: dict[str, list[dict[str, float]]] = {"plain": [], "clipping": [], "everything": []}

    def run(arm: str) -> float:
        figures[arm].append(apart(one_run, arm, arguments.size))
        return figures[arm][-1]["memory"]

    in_turn({arm: partial(run, arm) for arm in figures}, arguments.runs)
    rows = []
    for quantity, unit, scale in (("cpu_of_the_start", "s", 1.0), ("memory", "MB", 1e-6), ("checkpoint", "MB", 1e-6)):
        each = {arm: [scale * run[quantity] for run in runs] for arm, runs in figures.items()}
        rows.append(
            {
                **{"size": arguments.size, "runs": arguments.runs, "quantity": quantity, "unit": unit},
                **{arm: round(statistics.median(values), 3) for arm, values in each.items()},
                **over(each, "everything", "plain", "over_plain"),
            }
        )
    show("The whole suite over plain Lightning", rows, ("quantity", "unit", *figures, "over_plain"))
    CONSOLE.print(write_rows("together_cost", rows, key=("size",)))


def spent(arguments: argparse.Namespace) -> None:
    """One run; the time of this thread, of which a hook that is called within another one is not the other one's."""
    begin(0, *SAID)
    module, data = model_and_data(arguments.size)
    in_steps: Counter[str] = Counter()
    besides: Counter[str] = Counter()
    nested: list[float] = []  # for each hook in hand, what others have spent within it

    @contextlib.contextmanager
    def timed(call: tuple[str, str]) -> Iterator[None]:
        hook, name = call
        begun = time.thread_time()
        nested.append(0.0)
        try:
            yield
        finally:
            whole = time.thread_time() - begun
            each_step = any(word in hook for word in ("batch", "backward", "optimizer_step", "zero_grad"))
            (in_steps if each_step else besides)[name] += whole - nested.pop()
            if nested:
                nested[-1] += whole

    marks = Marks()
    with tempfile.TemporaryDirectory() as folder, surrounded(timed):
        trainer_for(folder, arguments.steps, *usual_callbacks(), marks).fit(module, data)
    step = (marks.seconds[-1] - marks.seconds[0]) / (len(marks.seconds) - 1)
    in_steps["all"], besides["all"] = in_steps.total(), besides.total()
    rows = [
        {
            **{"size": arguments.size, "steps": arguments.steps, "callback": name},
            "ms_a_step": round(1e3 * in_steps[name] / arguments.steps, 3),
            "of_a_step": round(in_steps[name] / arguments.steps / step, 5),
            "ms_besides": round(1e3 * besides[name], 1),
        }
        for name in in_steps
    ]
    rows.sort(key=lambda row: -float(row["ms_a_step"]))
    show("CPU time within the callbacks' hooks", rows, ("callback", "ms_a_step", "of_a_step", "ms_besides"))
    CONSOLE.print(write_rows("together_spent", rows, key=("size", "callback")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    soaking = parts.add_parser("soak")
    soaking.add_argument("--strategy", nargs="+", default=["single"], choices=list(RANKS))
    soaking.add_argument("--model", default="gpt", choices=["gpt", "vit"])
    soaking.add_argument("--precision", default="bf16-mixed", choices=PRECISIONS)
    soaking.add_argument("--steps", type=int, default=200)
    soaking.add_argument("--save-every", type=int, default=5, help="steps between two checkpoints")
    soaking.add_argument("--faults", type=int, default=10, help="how many")
    soaking.add_argument("--kinds", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    soaking.add_argument("--workers", type=int, default=2, help="data workers")
    soaking.add_argument("--rollbacks", action="store_true", help="with NaNs in a row, from which the guard goes back")
    soaking.add_argument("--seed", type=int, default=0)
    crashing = parts.add_parser("points")
    crashing.add_argument("--strategy", nargs="+", default=list(RANKS), choices=list(RANKS))
    crashing.add_argument("--model", default="vit", choices=["gpt", "vit"])
    crashing.add_argument("--workers", type=int, default=0, help="data workers")
    dying = parts.add_parser("deaths")
    dying.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    dying.add_argument("--steps", type=int, default=12)
    for name in ("cost", "spent"):
        costs = parts.add_parser(name)
        costs.add_argument("--size", default="10m", choices=["10m", "1m", "tiny", "many"])
        if name == "spent":
            costs.add_argument("--steps", type=int, default=100)
            continue
        costs.add_argument("--block", type=int, default=1, help="steps in a row under one arm")
        costs.add_argument("--rounds", type=int, default=170, help="blocks of each arm")
        costs.add_argument("--runs", type=int, default=3, help="of each arm, two at least, for what is not of a step")
    arguments = parser.parse_args()
    {"soak": soaks, "points": points, "deaths": deaths, "cost": cost, "spent": spent}[arguments.part](arguments)


if __name__ == "__main__":
    main()
