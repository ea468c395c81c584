"""`lightning-eff verify-resume`: runs a command unbroken, then killed and resumed, and compares each batch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lightning_eff._witness import ORDERS
from lightning_eff.arguments import check_count
from lightning_eff.cli.parser import Parser

_DESCRIPTION = """\
Runs a command of yours three times in a folder of its own: unbroken; saving a checkpoint and then killed by `kill -9`
on every rank; and resumed from that checkpoint. Compares what each rank saw behind every batch: samples, random
streams, losses, weights, optimizers. It reaches the Trainer through Lightning's entry point for callbacks, so under any
launcher. The command is not changed, but what it writes is redirected, and `fit` is given the checkpoint.
"""

_EPILOG = """\
The exit status is 0 where the resumed run is the unbroken one to the bit, 1 where it is not, and 2 where that could not
be found out: the command failed, or differs from itself even without a break.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 0: exact, 1: not, 2: not known."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    save_at = arguments.batches // 2 if arguments.save_at is None else arguments.save_at
    try:
        check_count("--batches", arguments.batches, least=3)
        check_count("--save-at", save_at, most=arguments.batches - 2)
    except ValueError as error:
        parser.error(str(error))
    if not command:
        parser.error("give the command behind --, as you would start it: -- torchrun --nproc-per-node 2 train.py")
    if not entry_points(group="lightning.pytorch.callbacks_factory", name="lightning_eff_witness"):
        print("lightning-eff verify-resume: the entry point is missing: install lightning-eff again", file=sys.stderr)
        return 2
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="verify-resume-")).absolute()
    orders = {"folder": str(folder), "batches": arguments.batches, "save_at": save_at, "kill_at": save_at + 1}
    for role in ("whole", "broken", "resumed"):
        print(f"{role}: {shlex.join(command)}", flush=True)
        if problem := _run(command, folder, {**orders, "role": role}):
            print(problem)
            return 2
    return _report(folder, save_at)


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff verify-resume", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--batches", type=int, default=12, help="training batches of the run (default %(default)s)")
    parser.add_argument("--save-at", type=int, help="batches behind which it is saved, then killed (default: half)")
    parser.add_argument("--folder", help="for what the runs write (default: a temporary folder)")
    parser.add_argument("command", nargs="...", metavar="-- COMMAND", help="starts the training, on all its ranks")
    return parser


def _run(command: list[str], folder: Path, orders: dict[str, Any]) -> str:
    """Run it in a role; what went wrong, if something did."""
    role = orders["role"]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{role}.rank*.jsonl"):
        old.unlink()
    output = folder / f"{role}.log"
    with output.open("w") as log:
        environment = {**os.environ, ORDERS: json.dumps(orders)}
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    notes = _notes(folder, role)
    wanted = orders["kill_at"] if role == "broken" else orders["batches"]
    short = [rank for rank, seen in notes.items() if max(seen, default=0) < wanted]
    if not notes:
        return f"the command never came to Trainer.fit (exit status {done.returncode}): see {output}"
    if short or (role != "broken" and done.returncode != 0):
        return f"the command ended before batch {wanted} (exit status {done.returncode}): see {output}"
    return ""


def _notes(folder: Path, role: str) -> dict[int, dict[int, dict[str, str]]]:
    """Of each rank, what it has seen behind each batch."""
    found: dict[int, dict[int, dict[str, str]]] = {}
    for file in sorted(folder.glob(f"{role}.rank*.jsonl")):
        rank = int(file.name.split(".rank")[1].removesuffix(".jsonl"))
        _, *lines = map(json.loads, file.read_text().splitlines())
        found[rank] = {line["batch"]: line["seen"] for line in lines}
    return found


def _report(folder: Path, save_at: int) -> int:
    changed = json.loads((folder / "resumed.rank0.jsonl").read_text().splitlines()[0])["changed"]
    print("changed for this:", *changed, sep="\n  ")
    whole, broken, resumed = (_notes(folder, role) for role in ("whole", "broken", "resumed"))
    if first := _first_difference(whole, broken):
        print(f"not known: the command differs from itself before it is broken off: {first}. Seed it: seed_everything")
        return 2
    if whole.keys() != resumed.keys():
        print(f"not known: {len(whole)} ranks, resumed {len(resumed)}")
        return 2
    if first := _first_difference(whole, resumed):
        print(f"NOT exact: saved behind batch {save_at} and killed; the resumed run differs first in {first}")
        return 1
    if missing := [batch for batch in whole[0] if batch > save_at and batch not in resumed[0]]:
        print(f"NOT exact: the resumed run leaves out batch {missing[0]}")
        return 1
    ranks, batches = len(whole), max(whole[0]) - save_at
    print(f"exact: {batches} batches behind the break are the same to the bit on {ranks} rank(s)")
    return 0


def _first_difference(whole: dict[int, dict[int, dict[str, str]]], other: dict[int, dict[int, dict[str, str]]]) -> str:
    """Of the earliest batch, in the order of cause and effect."""
    batches = sorted({batch for seen in other.values() for batch in seen})
    for batch in batches:
        for rank in sorted(other):
            one, two = whole.get(rank, {}).get(batch), other[rank].get(batch)
            if one is None or two is None:
                return f"batch {batch}, rank {rank}, which only one of them has"
            for name in {**one, **two}:
                if one.get(name) != two.get(name):
                    return f"batch {batch}, rank {rank}: {name}"
    return ""
