"""Preemption: how long from a signal to the checkpoint and to the exit, and what an ordinary step pays.

python -m benchmarks.preemption signal    # a signal to one rank in each phase, two and three ranks under torchrun
python -m benchmarks.preemption cost      # collectives, and process CPU time a step, plain Lightning against ours
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.rows import show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.runs import QUIET, quiet_lightning
from harness.timing import ratio
from lightning_eff.callbacks import Preemption

ROOT = Path(__file__).parent.parent
HOOKS = {
    "data loading": "on_train_batch_start",
    "forward": "on_before_backward",
    "backward": "on_after_backward",
    "before the update": "on_before_optimizer_step",
    "behind a step": "on_train_batch_end",
    "validation": "on_validation_batch_end",
}
EVERY = 10
WARM = 20


class Module(L.LightningModule):
    """A byte GPT of a million parameters on random bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randint(0, 256, (4096, 65)), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.randint(0, 256, (256, 65)), batch_size=4)


class Signal(L.Callback):
    """Sends SIGTERM to its own process in a hook, and notes when."""

    def __init__(self, hook: str, call: int) -> None:
        self.call, self.calls, self.at = call, 0, 0.0
        setattr(self, hook, self._called)

    def _called(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            self.step, self.at = trainer.global_step, time.time()
            os.kill(os.getpid(), signal.SIGTERM)


class Saved(L.Callback):
    """Notes when the last checkpoint was complete on this rank."""

    at = 0.0

    def on_exception(self, *_: Any) -> None:
        self.at = time.time()


class Steps(L.Callback):
    """Process CPU time and wall-clock of each step behind the first ones, and collectives."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.counts: dict[str, int] = {}

    def on_train_start(self, *_: Any) -> None:
        for name in ("broadcast", "all_reduce"):
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))

    def _counted(self, name: str, inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return inner(*args, **kwargs)

        return call

    def on_train_batch_end(self, *_: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        def each(times: list[float]) -> float:
            return (times[-1] - times[WARM]) / (len(times) - 1 - WARM)

        return {"cpu": each(self.cpu), "wall": each(self.wall), "counts": self.counts, "steps": len(self.wall)}


def worker(settings: dict[str, Any]) -> None:
    """One rank."""
    torch.set_num_threads(1)
    quiet_lightning()
    rank = int(os.environ["RANK"])
    steps, saved = Steps(), Saved()
    callbacks: list[L.Callback] = [saved, steps]
    sender = None
    if settings["ours"]:
        callbacks.append(Preemption(every_n_steps=EVERY))
    if settings.get("hook") and rank == settings["rank"]:
        sender = Signal(settings["hook"], settings["call"])
        callbacks.append(sender)
    trainer = L.Trainer(
        accelerator="cpu", devices=settings["ranks"], strategy="ddp", callbacks=callbacks,
        max_steps=settings["max_steps"], val_check_interval=200, limit_val_batches=settings["validation"],
        num_sanity_val_steps=0, default_root_dir=settings["folder"], **QUIET,
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        trainer.fit(Module())
    finally:
        found |= {"step": trainer.global_step, "ended": saved.at}
        if sender is not None:
            found |= {"signalled": sender.at, "at_step": sender.step}
        if settings["max_steps"] <= trainer.global_step:
            found |= steps.figures()
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


def signals() -> None:
    rows = []
    for ranks in (2, 3):
        for phase, hook in HOOKS.items():
            common = {"ours": True, "hook": hook, "call": 27, "rank": ranks - 1, "max_steps": 1000, "validation": 40}
            found, ended = run(ranks, **common)
            sent = found[-1]
            rows.append(
                {
                    "ranks": ranks,
                    "signal_to": f"rank {ranks - 1}",
                    "phase": phase,
                    "every_n_steps": EVERY,
                    "steps_until_stop": sent["step"] - sent["at_step"],
                    "ranks_at_one_step": len({rank["step"] for rank in found}) == 1,
                    "seconds_to_saved": round(max(rank["ended"] for rank in found) - sent["signalled"], 3),
                    "seconds_to_exit": round(ended - sent["signalled"], 3),
                }
            )
    show("From a signal to one rank to the end of all, 0.85 M GPT", rows)
    write_rows("preemption_signal", rows)


def cost(rounds: int, steps: int) -> None:
    figures: dict[str, dict[str, list[float]]] = {"cpu": {}, "wall": {}}
    counts = {}
    for turn in range(rounds):
        for ours in (bool(turn % 2), not turn % 2):
            name = "Preemption" if ours else "Lightning"
            found, _ = run(2, ours=ours, max_steps=steps, validation=0)
            for kind in figures:
                figures[kind].setdefault(name, []).append(statistics.mean(rank[kind] for rank in found))
            counts[name] = found[0]["counts"]
    rows = []
    for name in ("Lightning", "Preemption"):
        middle, low, high = ratio(figures["cpu"], name, "Lightning")
        wall, *_ = ratio(figures["wall"], name, "Lightning")
        rows.append(
            {
                "run": name,
                "ranks": 2,
                "steps": steps,
                "rounds": rounds,
                "broadcasts_in_all": counts[name].get("broadcast", 0),
                "all_reduces_in_all": counts[name].get("all_reduce", 0),
                "cpu_ms_a_step": round(1000 * statistics.median(figures["cpu"][name]), 2),
                "cpu_ratio": round(middle, 4),
                "cpu_ratio_low": round(low, 4),
                "cpu_ratio_high": round(high, 4),
                "wall_ratio": round(wall, 4),
            }
        )
    show("An ordinary step, 0.85 M GPT", rows)
    write_rows("preemption_cost", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["signal", "cost", "worker"])
    parser.add_argument("settings", nargs="?")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=220)
    arguments = parser.parse_args()
    if arguments.what == "worker":
        worker(json.loads(arguments.settings))
    elif arguments.what == "signal":
        signals()
    else:
        cost(arguments.rounds, arguments.steps)
