"""AsyncCheckpoint: how long training stands still for a save, and what a fault leaves on disk.

python -m benchmarks.async_checkpoint stall --size 124m   # Lightning's two ways and ours; on an idle machine
python -m benchmarks.async_checkpoint stall --size 124m --keep FOLDER --runs 1   # the same in pieces, run by run
python -m benchmarks.async_checkpoint faults --kills 100  # kill -9 while saving, disks that fail, bytes that change
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO as LightningsAsyncCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.gpt import GPT_1M, constant, parameters
from benchmarks.rows import publish
from examples.gpt.model import GPTConfig
from harness import REPOSITORY
from harness.processes import environment, eventually
from harness.runs import fit, quiet_lightning
from harness.timing import add_time_of, seconds_of_a_copy
from lightning_eff.callbacks import AsyncCheckpoint
from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage
from lightning_eff.training.rank_state import RankState, rank_state_files

SIZES = {"1m": GPT_1M, "124m": GPTConfig(block_size=128, n_layer=17, n_head=12, n_embd=768)}
VARIANTS = ("Lightning", "Lightning, AsyncCheckpointIO", "AsyncCheckpoint")


# --- the stall --------------------------------------------------------------------------------------------------------


class Times(L.Callback):
    """Seconds of each save as the training sees it, with what a later step waits for its copies, and of each step."""

    def __init__(self) -> None:
        self.saves: list[float] = []
        self.waits: list[float] = []
        self.cpu: list[float] = []
        self.steps: list[tuple[float, bool]] = []
        self.device_bytes = 0
        self._mark = 0.0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        inner: Any = trainer.save_checkpoint

        def timed(*args: Any, **kwargs: Any) -> None:
            self._wait()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            wall, cpu = time.perf_counter(), time.thread_time()
            inner(*args, **kwargs)
            self.saves.append(time.perf_counter() - wall)
            self.cpu.append(time.thread_time() - cpu)
            self.waits.append(0.0)
            if torch.cuda.is_available():
                self.device_bytes = max(self.device_bytes, torch.cuda.max_memory_allocated() - before)

        trainer.save_checkpoint = timed  # type: ignore[method-assign]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AsyncCheckpoint):  # what a step waits for the copies is of the save before it
                clocks = (self.saves, time.perf_counter), (self.cpu, time.thread_time), (self.waits, time.perf_counter)
                add_time_of(callback._io, "settle", *clocks)
                add_time_of(callback._overlap, "time_is_over", *clocks)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def on_train_batch_start(self, *_: Any) -> None:
        self._wait()
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # before ModelCheckpoint saves
        self._wait()
        writing = bool(self.saves) and trainer.global_step % trainer.save_every in (1, 2)  # type: ignore[attr-defined]
        self.steps.append((time.perf_counter() - self._mark, writing))


def stall_worker(settings: dict[str, Any]) -> None:
    """One variant in a process of its own."""
    torch.set_num_threads(settings["threads"])
    quiet_lightning("Checkpoint directory")
    config, variant = SIZES[settings["size"]], settings["variant"]
    module, times = constant(config), Times()
    data = DataLoader(torch.randint(0, 256, (4096, config.block_size + 1)), batch_size=settings["batch_size"])
    saver = ModelCheckpoint(settings["folder"], every_n_train_steps=settings["every"], save_top_k=1)
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_steps=settings["every"] * settings["saves"], logger=False,
        callbacks=[*([AsyncCheckpoint()] if variant == VARIANTS[2] else []), times, saver],
        plugins=[LightningsAsyncCheckpointIO()] if variant == VARIANTS[1] else None, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=settings["folder"],
    )  # fmt: skip
    trainer.save_every = settings["every"]  # type: ignore[attr-defined]
    trainer.fit(module, data)
    # Lightning's own way may leave older ones, whose removal came before they were written.
    checkpoint = max(Path(settings["folder"]).glob("*.ckpt"), key=os.path.getmtime)
    found = {
        "bytes": checkpoint.stat().st_size,
        "parameters": parameters(module),
        "saves": times.saves,
        "waits": times.waits,
        "cpu": times.cpu,
        "writing": [seconds for seconds, writing in times.steps[1:] if writing],
        "idle": [seconds for seconds, writing in times.steps[1:] if not writing],
        "device_bytes": times.device_bytes,
        "damage": damage(checkpoint),
        "bare_copy": seconds_of_a_copy(checkpoint.stat().st_size),
    }
    Path(settings["folder"], "found.json").write_text(json.dumps(found))


def stall(
    size: str, saves: int, every: int, rounds: int, threads: int, batch_size: int, keep: str | None, runs: int
) -> None:
    """Stall and slowdown of each variant; each round measures all of them, in an order that turns.

    ``keep`` is a folder for what was measured: what is in it is not measured again. At most ``runs`` are made now, and
    rows are written when none is missing.
    """
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(keep or temporary)
        kept.mkdir(exist_ok=True, parents=True)
        for turn in range(rounds):
            for variant in VARIANTS[turn % 3 :] + VARIANTS[: turn % 3]:
                file = kept / f"{size}-{saves}-{every}-{threads}-{batch_size}-{turn}-{VARIANTS.index(variant)}.json"
                if not file.exists():
                    if runs == 0:
                        return
                    runs -= 1
                    settings = {
                        "size": size, "saves": saves, "every": every, "threads": threads, "variant": variant,
                        "batch_size": batch_size,
                    }  # fmt: skip
                    file.write_text(json.dumps(_measured(settings)))
                found[variant].append(json.loads(file.read_text()))
    rows = []
    for variant in VARIANTS:
        runs = found[variant]
        later = sorted(seconds for run in runs for seconds in run["saves"][1:])
        rows.append(
            {
                "variant": variant,
                "parameters": runs[0]["parameters"],
                "checkpoint_bytes": runs[0]["bytes"],
                "saves": rounds * saves,
                "first_stall_ms": round(1e3 * statistics.median(run["saves"][0] for run in runs), 2),
                "stall_ms": round(1e3 * statistics.median(later), 2),
                "stall_ms_p99": round(1e3 * later[min(len(later) - 1, int(0.99 * len(later)))], 2),
                "of_it_in_the_next_step_ms": round(
                    1e3 * statistics.median(w for run in runs for w in run["waits"][1:]), 2
                ),
                "cpu_ms": round(1e3 * statistics.median(cpu for run in runs for cpu in run["cpu"][1:]), 2),
                "step_ms": round(1e3 * statistics.median(step for run in runs for step in run["idle"]), 2),
                "step_ms_while_writing": round(1e3 * statistics.median(s for run in runs for s in run["writing"]), 2),
                "bare_copy_ms": round(1e3 * statistics.median(run["bare_copy"] for run in runs), 2),
                "device_bytes": max(run["device_bytes"] for run in runs),
                "whole": all(run["damage"] is None for run in runs),
            }
        )
    base = rows[0]["stall_ms"]
    for row in rows:
        row["stall_ratio"] = round(row["stall_ms"] / base, 4)
    publish(f"A save as the training sees it, {size}", f"async_checkpoint_stall_{size}", rows)


def _measured(settings: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = json.dumps({"folder": folder, **settings})
        command = [sys.executable, "-m", "benchmarks.async_checkpoint", "worker", words]
        subprocess.run(command, cwd=REPOSITORY, check=True)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        return found


# --- faults -----------------------------------------------------------------------------------------------------------


class Counter(L.LightningModule):
    """Its weights say of which step they are: all of them are 1 / 1,024 larger after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(8)])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -torch.stack([weight.sum() for weight in self.weights]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1 / 1024, momentum=1e-30)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(100_000, 1))  # type: ignore[arg-type]


class Beside(L.Callback):
    """State of a rank, which lies in a file beside each checkpoint and says of which step it is."""

    def __init__(self) -> None:
        self.steps = torch.zeros(50_000)
        self.state = RankState("beside", save=lambda: {"steps": self.steps}, load=lambda state: None)

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.state.attach(trainer.strategy)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.fill_(trainer.global_step)


def is_right(checkpoint: dict[str, Any]) -> bool:
    """Whether all weights and all momenta are those of the step that a checkpoint says."""
    weights = torch.cat(list(checkpoint["state_dict"].values()))
    momentum = torch.cat([state["momentum_buffer"] for state in checkpoint["optimizer_states"][0]["state"].values()])
    return bool((weights == checkpoint["global_step"] / 1024).all()) and bool((momentum == -1).all())


def fault_worker(settings: dict[str, Any]) -> None:
    """Save after each step, until something happens."""
    torch.set_num_threads(1)
    quiet_lightning("Checkpoint directory")
    folder = Path(settings["folder"])
    if "file_size" in settings:  # a disk that is full: no file may be longer
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_size"], settings["file_size"]))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
    callback = AsyncCheckpoint(retry_seconds=0.0, **settings.get("arguments", {}))
    callbacks = [callback, saver, *([Beside()] if settings.get("beside") else [])]
    fit(Counter(settings.get("width", 20_000)), *callbacks, max_steps=settings["steps"], default_root_dir=folder)


def start(folder: Path, steps: int = 100_000, **settings: Any) -> subprocess.Popen[str]:
    """Such a run in a process of its own."""
    words = json.dumps({"folder": str(folder), "steps": steps, **settings})
    command = [sys.executable, "-m", "benchmarks.async_checkpoint", "fault-worker", words]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), **pipes)


def wrong(folder: Path) -> list[str]:
    """Checkpoints that are not what they say, or without the state beside them; `last` has to be there."""
    names = [name for name in os.listdir(folder) if name.endswith(".ckpt")]
    lost = [] if "last.ckpt" in names else ["last.ckpt"]
    return lost + [name for name in names if not _is_whole(folder / name)]


def _is_whole(path: Path) -> bool:
    try:
        checkpoint = torch.load(path, weights_only=True)
        files = rank_state_files(str(path), checkpoint)
        states = [torch.load(file, weights_only=True)["state"]["steps"] for file in files]
        whole = all(damage(file) is None for file in (path, *files))
        return whole and is_right(checkpoint) and all((s == checkpoint["global_step"]).all() for s in states)
    except Exception:  # whatever torch says of it
        return False


def kill_worker(settings: dict[str, Any]) -> None:
    """Fork a run for each seed and kill it while it saves: what all of them share is imported once."""
    torch.set_num_threads(1)
    found = []
    for seed in range(settings["kills"]):
        folder = Path(settings["folder"], str(seed))
        child = os.fork()
        if child == 0:
            try:
                fault_worker({"folder": str(folder), "steps": 100_000, "beside": True})
            finally:
                os._exit(1)
        try:
            eventually(lambda folder=folder: (folder / "last.ckpt").exists(), 120, "it has not begun to save")
            time.sleep(random.Random(seed).uniform(0, 0.3))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found.append({"wrong": wrong(folder), "in_flight": len(list(folder.glob("*.part")))})
        shutil.rmtree(folder)
    Path(settings["folder"], "found.json").write_text(json.dumps(found))


def killed(folder: Path, kills: int) -> list[dict[str, Any]]:
    """Of each killed run: the checkpoints that are wrong, and how many files it was writing."""
    words = json.dumps({"folder": str(folder), "kills": kills})
    command = [sys.executable, "-m", "benchmarks.async_checkpoint", "kill-worker", words]
    subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True, capture_output=True)
    found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def faults(kills: int) -> None:
    """What each fault leaves, and what is said of it."""
    rows = []

    def add(fault: str, trials: int, loads_wrong: int, says: str) -> None:
        rows.append({"fault": fault, "trials": trials, "checkpoints_that_load_wrong": loads_wrong, "says": says})

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs = killed(folder, kills)
        writing = sum(run["in_flight"] > 0 for run in runs)
        says = f"nothing; {writing} were killed with a file half written, which has another name"
        add("kill -9 while saving", kills, sum(len(run["wrong"]) for run in runs), says)
        full = start(folder / "full", steps=6, file_size=500_000)
        _, said = full.communicate()
        there = list((folder / "full").glob("*"))
        add("no file may be longer than 0.5 MB", 1, len(there), _sentence(said))
        fit(Counter(2_000), ModelCheckpoint(folder, filename="one"), AsyncCheckpoint(), max_steps=3)
        whole = (folder / "one.ckpt").read_bytes()
        for fault in ("one byte flipped", "cut off"):
            unseen, says = 0, ""
            for seed in range(100):
                rng = random.Random(seed)
                content = bytearray(whole)
                if fault == "cut off":
                    del content[rng.randrange(len(content)) :]
                else:
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                (folder / "one.ckpt").write_bytes(content)
                found = damage(folder / "one.ckpt")
                says = found or says
                if found is None:
                    unseen += not is_right(torch.load(folder / "one.ckpt", weights_only=True))
            add(fault, 100, unseen, says)
    publish("Faults, 1.3 MB checkpoints", "async_checkpoint_faults", rows)


def _sentence(said: str) -> str:
    lines = [line for line in said.splitlines() if "could not be written" in line]
    return re.sub(r"\S*/", "", lines[-1]) if lines else "nothing"  # names without their folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stall", "faults", "worker", "fault-worker", "kill-worker"])
    parser.add_argument("settings", nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="1m")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--every", type=int, default=8, help="steps between two saves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--keep", help="folder of what was measured, to go on with later")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many now; by default all")
    parser.add_argument("--kills", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.what == "worker":
        stall_worker(json.loads(arguments.settings))
    elif arguments.what == "fault-worker":
        fault_worker(json.loads(arguments.settings))
    elif arguments.what == "kill-worker":
        kill_worker(json.loads(arguments.settings))
    elif arguments.what == "faults":
        faults(arguments.kills)
    else:
        stall(
            arguments.size, arguments.saves, arguments.every, arguments.rounds, arguments.threads,
            arguments.batch_size, arguments.keep, arguments.runs,
        )  # fmt: skip
