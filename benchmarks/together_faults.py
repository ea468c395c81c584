"""Runs of the whole suite in real processes, and what is done to them: signals to ranks, and a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.together_runs import RANKS, Settings, differences, train
from harness.forked import ForkedRanks
from harness.processes import environment, free_port

FAULTS = ("kill one", "kill all", "SIGTERM", "SIGSTOP", "full disk")
GRACE = 20.0
"""Seconds in which ranks are to end behind one that has, before they are killed, as a launcher does."""
HEARTBEAT = 8
"""Seconds after which a silent replica counts as dead: more than one waits for a core on a busy machine."""


def as_replica(lighthouse: str, function: Callable[..., Any], *arguments: Any) -> None:
    """What a forked process does whose rank is a replica of its own."""
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    del os.environ["TORCHELASTIC_RUN_ID"]
    os.environ |= {"TORCHFT_LIGHTHOUSE": lighthouse, "REPLICA_GROUP_ID": rank, "NUM_REPLICA_GROUPS": ranks}
    function(*arguments)


class Replicas(ForkedRanks):
    """Processes of ``ddp_ft``, each of which can begin anew while the others go on."""

    def __init__(self, ranks: int, folder: Path, lighthouse: str, settings: Settings, *others: Any) -> None:
        self.arguments = (lighthouse, train, settings, *others)
        super().__init__(ranks, folder, as_replica, *self.arguments)

    def again(self, rank: int) -> None:
        """Start one that has ended."""
        self.pids[rank] = self._fork(rank, len(self.pids), free_port(), as_replica, self.arguments)
        self.status[rank] = None


@contextlib.contextmanager
def lighthouse() -> Iterator[str]:
    """Where the replicas meet."""
    port = free_port()
    command = [sys.executable, "-m", "lightning_eff", "lighthouse", "--bind", f"127.0.0.1:{port}"]
    command += ["--heartbeat-timeout", str(HEARTBEAT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of its own in memory, which can be filled; only root can mount one."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@dataclass
class Outcome:
    """Of a run that was disturbed."""

    lives: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    """Where it ended otherwise than the run that was left alone."""
    largest: float = 0.0
    """Difference of a weight."""
    steps: int = 0
    """Made by the run that was left alone: fewer than were asked for where GradES has ended it."""


def undisturbed(settings: Settings, seconds: float = 3600.0) -> None:
    """A run that is left alone."""
    for folder in (settings.folder, settings.beside):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(life(settings, stack))
        status = run.wait(seconds)
        if any(status.values()):
            text = "\n".join(run.text(rank)[-3000:] for rank, code in status.items() if code)
            raise RuntimeError(f"the run that was left alone has failed: {status}\n{text}")


def disturbed(settings: Settings, faults: list[str], seed: int, most_lives: int = 0) -> Outcome:
    """The same run with so many faults at random batches, begun anew whenever it has ended before its end."""
    draw = random.Random(seed)
    batches = settings.steps * 2
    plan = sorted(draw.sample(range(4, batches * 3 // 4), len(faults)))  # it is seen some batches later
    kinds = draw.sample(faults, len(faults))
    for folder in (settings.folder, settings.beside):
        folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    with contextlib.ExitStack() as outer:
        house = outer.enter_context(lighthouse()) if settings.strategy == "ddp_ft" else ""
        while True:
            outcome.lives += 1
            if outcome.lives > (most_lives or len(faults) + 4):
                raise RuntimeError(f"it does not come to its end: {outcome}\n{_text(settings.beside)}")
            with contextlib.ExitStack() as stack:
                run = stack.enter_context(life(settings, stack, house))
                _disturb(run, settings, plan, kinds, draw, outcome, stack)
                if not any(run.status.values()):
                    return outcome


def compare(one: Settings, other: Settings) -> list[str]:
    """Where their ends differ, on any rank."""
    found = []
    for rank in range(RANKS[one.strategy]):
        ends = (torch.load(each.beside / f"final-{rank}.pt", weights_only=False) for each in (one, other))
        found += [f"rank {rank}{text}" for text in differences(*ends)]
    return found


def apart_by_weight(one: Settings, other: Settings) -> dict[str, float]:
    """The largest difference of each parameter at their ends, on any rank that has come to the other's end.

    The bias of an attention's keys has an entry of its own: softmax does not see it, so that its gradient is nothing
    but rounding, of which AdamW makes steps as long as all others.
    """
    found: dict[str, float] = {}
    for path in other.beside.glob("final-*.pt"):
        a, b = (torch.load(each, weights_only=False)["parameters"] for each in (one.beside / path.name, path))
        for name in a:
            gap = (a[name].double() - b[name].double()).abs()
            parts = {name: gap}
            if name.endswith("in_proj_bias"):
                query, keys, value = gap.chunk(3)
                parts = {name: torch.cat([query, value]), f"{name} of the keys": keys}
            found |= {part: max(found.get(part, 0.0), float(each.max())) for part, each in parts.items()}
    return found


def life(settings: Settings, stack: contextlib.ExitStack, house: str = "", *others: Any) -> ForkedRanks:
    """The processes of one life of a run, with other callbacks beside."""
    ranks = RANKS[settings.strategy]
    if settings.strategy == "ddp_ft":
        return Replicas(ranks, settings.beside, house or stack.enter_context(lighthouse()), settings, *others)
    return ForkedRanks(ranks, settings.beside, train, settings, *others)


def _disturb(
    run: ForkedRanks, settings: Settings, plan: list[int], kinds: list[str], draw: random.Random, outcome: Outcome,
    stack: contextlib.ExitStack,
) -> None:  # fmt: skip
    """Until all have ended."""
    began, ended_at = time.time(), None
    later: list[tuple[float, Any]] = []
    try:
        while run.running():
            now = time.monotonic()
            for due in [entry for entry in later if entry[0] <= now]:
                later.remove(due)
                due[1]()
            place = _place(settings.beside, began)
            if plan and place >= plan[0]:
                plan.pop(0)
                kind = kinds.pop(0)
                outcome.faults[kind] += 1
                later += _fault(run, kind, draw, settings.folder)
            gone = {rank: status for rank, status in run.status.items() if status is not None}
            if isinstance(run, Replicas):
                for rank, status in gone.items():
                    if not (settings.beside / f"final-{rank}.pt").exists():  # with status 0 it has left in order
                        outcome.statuses[str(status)] += 1
                        run.again(rank)
            elif any(gone.values()):
                ended_at = ended_at or now
                if now > ended_at + GRACE:
                    for rank in run.running():
                        outcome.statuses["ended by the launcher"] += 1
                        os.kill(run.pids[rank], signal.SIGCONT)
                        os.kill(run.pids[rank], signal.SIGKILL)
            time.sleep(0.01)
    finally:
        for _, action in later:
            action()
    outcome.statuses.update(str(status) for status in run.status.values())


def _fault(run: ForkedRanks, kind: str, draw: random.Random, folder: Path) -> list[tuple[float, Any]]:
    """Begin it; what is to be done later, and when."""
    running = run.running()
    if not running:
        return []
    victim = run.pids[draw.choice(running)]
    if kind == "kill one":
        os.kill(victim, signal.SIGKILL)
    elif kind == "kill all":
        for rank in running:
            os.kill(run.pids[rank], signal.SIGKILL)
    elif kind == "SIGTERM":
        os.kill(victim, signal.SIGTERM)
    elif kind == "SIGSTOP":
        os.kill(victim, signal.SIGSTOP)
        return [(time.monotonic() + draw.uniform(0.2, 2.0), lambda: _continue(run, victim))]
    elif kind == "full disk":
        filler = folder / "filler"
        _fill(filler)
        return [(time.monotonic() + 10.0, lambda: filler.unlink(missing_ok=True))]
    return []


def _continue(run: ForkedRanks, pid: int) -> None:
    """Unless it has ended: its number may be another process's by now."""
    if pid in [run.pids[rank] for rank in run.running()]:
        os.kill(pid, signal.SIGCONT)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def _place(folder: Path, since: float) -> int:
    """The batch that is behind, as the diaries of this life say; -1 before the first."""
    places = [-1]
    for path in folder.glob("diary-*.jsonl"):
        if path.stat().st_mtime >= since:
            lines = path.read_text().splitlines()
            with contextlib.suppress(ValueError, IndexError):
                places.append(json.loads(lines[-1])["batch"])
    return max(places)


def _text(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("rank*.log")))


def soak(settings: Settings, faults: list[str], seed: int) -> Outcome:
    """A run that is left alone beside one that is disturbed."""
    alone = replace(settings, folder=settings.folder / "alone")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(small_disk(96)) if "full disk" in faults else settings.folder
        other = replace(settings, folder=folder / "disturbed", notes=settings.folder / "notes")
        undisturbed(alone)
        outcome = disturbed(other, faults, seed)
        outcome.different = compare(alone, other)
        outcome.largest = max(apart_by_weight(alone, other).values())
        outcome.steps = torch.load(alone.beside / "final-0.pt", weights_only=False)["step"]
    return outcome
