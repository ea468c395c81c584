"""Preemption: how long from a signal to the checkpoint and to the exit, and what an ordinary step pays.

python -m benchmarks.preemption signal    # a signal to one rank in each phase, two and three ranks under torchrun
python -m benchmarks.preemption cost      # process CPU time a step, with and without, in turn within one run
python -m benchmarks.preemption counts    # collectives and host syncs of plain Lightning and of ours
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from benchmarks.rows import show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.alternating import COLUMNS, Alternating, cost_row
from harness.forked import ForkedRanks
from harness.operators import OperatorCounter
from harness.runs import QUIET, quiet_lightning
from lightning_eff.callbacks import Preemption

ROOT = Path(__file__).parent.parent
PHASES = {  # where the signal comes, and at which call of it
    "sanity check": ("on_validation_batch_start", 1),
    "compile": ("compile", 1),
    "data loading": ("data", 109),
    "batch start": ("on_train_batch_start", 27),
    "forward": ("on_before_backward", 27),
    "backward": ("on_after_backward", 27),
    "before the update": ("on_before_optimizer_step", 27),
    "batch end": ("on_train_batch_end", 27),
    "saving": ("on_save_checkpoint", 1),
    "validation": ("on_validation_batch_end", 27),
}
EVERY = 10
WARM = 20
COUNTED = 40  # steps
SIZES = {  # of the GPT: layers, heads and width
    "0.01 M": (1, 1, 16),
    "0.1 M": (2, 2, 64),
    "0.85 M": (4, 4, 128),
    "10.8 M": (6, 6, 384),
}
PLAIN, SILENT, OURS = "Lightning", "Lightning without its broadcast", "Preemption"


class Rows(Dataset[torch.Tensor]):
    """Random bytes, and what is called when one row is asked for."""

    def __init__(self, rows: int, called: Any = None) -> None:
        self.rows = torch.randint(0, 256, (rows, 65))
        self.called = called

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.called is not None:
            self.called()
        return self.rows[index]


class Signal(L.Callback):
    """Sends SIGTERM to its own process in a hook, or where it is called by hand, and notes when."""

    def __init__(self, where: str, call: int) -> None:
        self.call, self.calls, self.at, self.step = call, 0, 0.0, 0
        self.trainer: Any = None
        if hasattr(self, where):
            setattr(self, where, self.here)

    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.trainer = trainer

    def here(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            self.step, self.at = self.trainer.global_step, time.time()
            os.kill(os.getpid(), signal.SIGTERM)


class Module(L.LightningModule):
    """A byte GPT on random bytes."""

    def __init__(self, where: str | None, sender: Signal | None, waits: bool, size: str) -> None:
        super().__init__()
        self.waits = waits
        layers, heads, width = SIZES[size]
        self.model = GPT(GPTConfig(block_size=64, n_layer=layers, n_head=heads, n_embd=width))
        self.called = sender.here if sender is not None and where == "data" else None
        if where == "compile":

            def backend(graph: Any, inputs: Any) -> Any:
                if sender is not None:
                    sender.here()
                return graph

            self.model.compile(backend=backend)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        if self.waits:  # AdamW on the CPU reads its count of steps for each parameter
            return torch.optim.SGD(self.parameters(), lr=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(4096, self.called), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(256), batch_size=4)


class Saved(L.Callback):
    """Notes when the last checkpoint was complete on this rank."""

    at = 0.0

    def on_exception(self, *_: Any) -> None:
        self.at = time.time()


class Waits(L.Callback):
    """Counts the moments, in the steps behind the first ones, at which the host would wait for a device."""

    def __init__(self) -> None:
        self.counter = OperatorCounter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM:
            self.counter.__enter__()

    def on_train_end(self, *_: Any) -> None:
        self.counter.__exit__()


class Collectives(L.Callback):
    """Counts those that this rank calls while it trains."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def on_train_start(self, *_: Any) -> None:
        for name in ("broadcast", "all_reduce"):
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))

    def _counted(self, name: str, inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return inner(*args, **kwargs)

        return call


class Arms:
    """A Trainer with the callback, without it, and without Lightning's own broadcast as well."""

    hooks = ("on_advance_end", "_broadcast_sigterm_tensor")  # of the loop, which the callback stands in front of

    def __init__(self) -> None:
        self.callbacks: list[Any] = []
        self.wrappers: dict[str, Any] = {}

    def plain(self, trainer: Any) -> None:
        own = self._own(trainer)
        self.callbacks = self.callbacks or trainer.callbacks
        self.wrappers = self.wrappers or {name: own[name] for name in self.hooks}
        for name in self.hooks:
            own.pop(name, None)
        trainer.callbacks = [each for each in self.callbacks if not isinstance(each, Preemption)]

    def silent(self, trainer: Any) -> None:
        self.plain(trainer)
        self._own(trainer)["_broadcast_sigterm_tensor"] = lambda: None

    def ours(self, trainer: Any) -> None:
        self._own(trainer).update(self.wrappers)
        trainer.callbacks = self.callbacks

    def _own(self, trainer: Any) -> dict[str, Any]:
        return vars(trainer.fit_loop.epoch_loop)


def worker(settings: dict[str, Any]) -> None:
    """One rank."""
    torch.set_num_threads(1)
    quiet_lightning()
    rank = int(os.environ["RANK"])
    saved, waits, collectives = Saved(), Waits(), Collectives()
    callbacks: list[L.Callback] = [saved, *([waits] if settings.get("waits") else [])]
    sender, where = None, settings.get("where")
    preemption = Preemption(every_n_steps=EVERY)
    arms = Arms()
    # Five steps behind the first ones, so that what happens every ten does so in the midst of a block.
    turns = Alternating({OURS: arms.ours, PLAIN: arms.plain, SILENT: arms.silent}, block=EVERY, warm=WARM + EVERY // 2)
    if settings.get("counts"):
        callbacks.append(collectives)
    if settings["ours"]:
        callbacks.append(preemption)
    if settings.get("turns"):
        callbacks.append(turns)
    if where and rank == settings["rank"]:
        sender = Signal(where, settings["call"])
        callbacks.append(sender)
    if where == "on_save_checkpoint":
        callbacks.append(ModelCheckpoint(settings["folder"], every_n_train_steps=25))
    trainer = L.Trainer(
        accelerator="cpu", devices=settings["ranks"], strategy="ddp", callbacks=callbacks,
        max_steps=settings["max_steps"], val_check_interval=200, limit_val_batches=settings["validation"],
        num_sanity_val_steps=2 if where == "on_validation_batch_start" else 0, default_root_dir=settings["folder"],
        **QUIET | {"enable_checkpointing": where == "on_save_checkpoint"},
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        trainer.fit(Module(where, sender, settings.get("waits", False), settings.get("size", "0.85 M")))
    finally:
        found |= {"step": trainer.global_step, "ended": saved.at, "waits": waits.counter.waits}
        if preemption.saved is not None:
            found["saved_step"] = torch.load(preemption.saved, weights_only=True)["global_step"]
        if sender is not None:
            found |= {"signalled": sender.at, "at_step": sender.step}
        found |= {"counts": collectives.counts, **turns.figures()}
        Path(settings["folder"], f"{rank}.json").write_text(json.dumps(found))


def run(ranks: int, **settings: Any) -> tuple[list[dict[str, Any]], float]:
    """What each rank has found, and when torchrun's workers had ended."""
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"ranks": ranks, "folder": folder}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.preemption", "worker", json.dumps(settings)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, check=False)
        ended = time.time()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)], ended


def run_forked(**settings: Any) -> list[dict[str, Any]]:
    """What each of two ranks has found that need no launcher."""
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"ranks": 2, "folder": folder, "validation": 0}
        with ForkedRanks(2, Path(folder), worker, settings) as forked:
            forked.wait(900)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def signals(ranks_of: Sequence[int], phases: Sequence[str]) -> None:
    rows = []
    for ranks in ranks_of:
        for phase in phases:
            where, call = PHASES[phase]
            common = {
                "where": where,
                "call": call,
                "rank": ranks - 1,
                "max_steps": 1000,
                "validation": 40,
            }
            found, ended = run(ranks, ours=True, **common)
            sent = found[-1]
            rows.append(
                {
                    "ranks": ranks,
                    "signal_to": f"rank {ranks - 1}",
                    "phase": phase,
                    "every_n_steps": EVERY,
                    "steps_until_stop": sent["step"] - sent["at_step"],
                    "lost_steps": max(rank["step"] - rank["saved_step"] for rank in found),
                    "ranks_at_one_step": len({rank["step"] for rank in found}) == 1,
                    "seconds_to_saved": round(max(rank["ended"] for rank in found) - sent["signalled"], 3),
                    "seconds_to_exit": round(ended - sent["signalled"], 3),
                    "load": round(os.getloadavg()[0], 1),
                }
            )
            print(rows[-1], flush=True)
            write_rows("preemption_signal", rows[-1:], key=("ranks", "phase"))
    show("From a signal to one rank to the end of all, 0.85 M GPT", rows)


def cost(size: str, rounds: int) -> None:
    """Process CPU time of a step, of both ranks."""
    steps = WARM + EVERY // 2 + 3 * EVERY * rounds
    found = run_forked(ours=True, turns=True, size=size, max_steps=steps)
    load = round(os.getloadavg()[0], 1)
    rows = []
    for other in (PLAIN, SILENT):
        about = {"size": size, "run": OURS, "over": other, "ranks": 2, "steps_in_a_block": EVERY}
        rows.append({**about, **cost_row(found, OURS, other), "load": load})
    show(f"An ordinary step, {size} GPT", rows, ["over", *COLUMNS])
    write_rows("preemption_cost", rows, key=("size", "over"))


def counts() -> None:
    rows = []
    for name in (PLAIN, OURS):
        collectives = run_forked(ours=name == OURS, counts=True, max_steps=130)[0]["counts"]
        waits = run_forked(ours=name == OURS, waits=True, max_steps=WARM + COUNTED)[0]["waits"]
        rows.append(
            {
                "run": name,
                "ranks": 2,
                "steps": 130,
                "broadcasts_in_all": collectives.get("broadcast", 0),
                "all_reduces_in_all": collectives.get("all_reduce", 0),
                "reads_of_host_tensors_in_40_steps": waits.pop("tolist", 0),
                "host_syncs_in_40_steps": sum(waits.values()),
            }
        )
    show("An ordinary step, 0.85 M GPT", rows)
    write_rows("preemption_counts", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["signal", "cost", "counts", "worker"])
    parser.add_argument("settings", nargs="?")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--size", choices=list(SIZES), default="0.85 M")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.what == "worker":
        worker(json.loads(arguments.settings))
    elif arguments.what == "signal":
        signals(arguments.ranks, arguments.phases)
    elif arguments.what == "counts":
        counts()
    else:
        cost(arguments.size, arguments.rounds)
