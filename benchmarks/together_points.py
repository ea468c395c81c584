"""Crash points: a rank ends itself by `kill -9` in a given hook, and the run begins anew from its last checkpoint.

All points of a strategy lie in one run, one behind the other: each life of it is resumed from what the one before has
left, and what it computes is compared with the run that was left alone, batch by batch and at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.together_faults import compare, life, undisturbed
from benchmarks.together_runs import RANKS, Settings, differences

POINTS = (
    *("on_train_batch_end", "on_after_backward", "on_before_optimizer_step", "on_train_batch_start"),
    *("on_validation_batch_end", "on_save_checkpoint", "on_train_epoch_end"),
    *("on_before_zero_grad", "on_before_backward", "on_validation_start", "on_train_batch_end"),
    *("on_validation_end", "on_save_checkpoint", "on_train_epoch_end"),
    *("on_before_optimizer_step", "on_train_batch_start", "on_after_backward", "on_save_checkpoint"),
    *("on_validation_batch_end", "on_before_optimizer_step"),
)
"""Hooks in which it dies, in this order. The seventh and the fourteenth place is at the end of an epoch, of 36, 18 or
12 batches on one, two or three ranks; the fourth and the sixteenth is right behind the begin of a checkpoint."""

APART = 5
"""Batches between two points, at least."""

STEPS, SAVE_EVERY = 56, 2
"""Of such a run; a step has two batches."""

GRACE = 1.0
"""Seconds in which ranks are to end behind one that has."""


class DiesAt(L.Callback):
    """Ends its own process as `kill -9` does, at each point once in all lives of a run.

    Point n is the first call of its hook at or behind batch ``APART * (n + 1)``, when all points before have been. The
    rank takes turns; where only one rank saves, that one dies.

    Args:
        points: hooks.
        folder: where it notes what has been.
        victim: who dies, in place of the rank whose turn it is.
    """

    def __init__(self, points: tuple[str, ...], folder: Path, victim: int | None = None) -> None:
        self.points = points
        self.folder = folder
        self.victim = victim
        self.rank = -1

    def setup(self, *_: Any, **__: Any) -> None:
        self.rank = int(os.environ.get("REPLICA_GROUP_ID", os.environ.get("RANK", 0)))
        self.ranks = int(os.environ.get("NUM_REPLICA_GROUPS", os.environ.get("WORLD_SIZE", 1)))

    def pass_by(self, hook: str, trainer: L.Trainer) -> None:
        number = len(list(self.folder.glob("point-*.json")))
        if number == len(self.points) or hook != self.points[number]:
            return
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        turn = number % self.ranks if self.victim is None else self.victim
        mine = self.rank == turn or hook == "on_save_checkpoint"
        if not mine or batch < APART * (number + 1):
            return
        with contextlib.suppress(FileExistsError), (self.folder / f"point-{number:02d}.json").open("x") as file:
            file.write(json.dumps({"hook": hook, "batch": batch, "rank": self.rank}))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def _passing(hook: str) -> Any:
    def passing(self: DiesAt, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.pass_by(hook, trainer)

    return passing


for _hook in set(POINTS):
    setattr(DiesAt, _hook, _passing(_hook))


def passed(folder: Path) -> list[dict[str, Any]]:
    """The points that a run has died at so far."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("point-*.json"))]


@dataclass
class Crashes:
    """What came of them."""

    lives: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)
    again: int = 0
    """Batches of a rank that were made more than once."""
    different: list[str] = field(default_factory=list)
    """Batches, and what is otherwise at the end."""


def crash(settings: Settings, points: tuple[str, ...] = POINTS) -> Crashes:
    """A run that is left alone beside one that dies at each point."""
    alone = replace(settings, folder=settings.folder / "alone")
    other = replace(settings, folder=settings.folder / "crashed")
    other.folder.mkdir(parents=True)
    undisturbed(alone)
    found = Crashes()
    while not _lived(other, points):
        found.lives += 1
        found.points = passed(other.folder)
        if found.lives != len(found.points):
            text = "\n".join(path.read_text()[-3000:] for path in sorted(other.folder.glob("rank*.log")))
            raise RuntimeError(f"life {found.lives} has ended at no point: {found.points}\n{text}")
    found.lives += 1
    for rank in range(RANKS[settings.strategy]):
        whole, parts = (_diary(each.folder / f"diary-{rank}.jsonl") for each in (alone, other))
        losses = {line["batch"]: line for line in whole}
        found.again += len(parts) - len({line["batch"] for line in parts})
        for line in parts:
            found.different += differences(losses[line["batch"]], line, f"rank {rank}, batch {line['batch']}")
    found.different += compare(alone, other)
    return found


def _lived(settings: Settings, points: tuple[str, ...]) -> bool:
    """One life; whether it has come to its end."""
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(life(settings, stack, "", DiesAt(points, settings.folder)))
        deadline = time.monotonic() + 300.0
        while run.running() and time.monotonic() < deadline:
            if any(run.status.values()):
                # Replicas that are left would go on without it; other ranks find out, or the launcher ends them.
                deadline = min(deadline, time.monotonic() + (0.0 if settings.strategy == "ddp_ft" else GRACE))
            time.sleep(0.005)
    return not any(run.status.values())


def _diary(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def death(settings: Settings) -> tuple[Settings, Settings]:
    """Of ``ddp_ft``: a run that is left alone, and one that the others end without their last replica.

    It dies in a backward pass, the second of a step's two, so that the others repeat both.
    """
    alone = replace(settings, folder=settings.folder / "alone")
    other = replace(settings, folder=settings.folder / "without")
    undisturbed(alone)
    other.folder.mkdir()
    last = RANKS["ddp_ft"] - 1
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(life(other, stack, "", DiesAt(("on_after_backward",), other.folder, last)))
        status = run.wait(1500.0)
        if status != dict.fromkeys(range(last), 0) | {last: -signal.SIGKILL}:
            raise RuntimeError(f"{status}\n{run.text()[-6000:]}")
    return alone, other


def losses_apart(one: Settings, other: Settings) -> dict[int, float]:
    """By batch, the largest difference of a loss on the ranks that have lived."""
    found: dict[int, float] = {}
    for path in sorted(other.folder.glob("final-*.pt")):
        name = path.name.replace("final", "diary").replace("pt", "jsonl")
        losses = {line["batch"]: line["loss"] for line in _diary(one.folder / name)}
        for line in _diary(other.folder / name):
            gap = 0.0 if math.isnan(line["loss"]) else abs(line["loss"] - losses[line["batch"]])
            found[line["batch"]] = max(found.get(line["batch"], 0.0), gap)
    return found


def hooks(points: list[dict[str, Any]]) -> str:
    """How often which hook was the place."""
    return "; ".join(f"{hook} {count}" for hook, count in sorted(Counter(point["hook"] for point in points).items()))
