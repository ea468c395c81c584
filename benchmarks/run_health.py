"""RunHealth: who is named, where and how soon; false alarms; and what an ordinary step pays.

python -m benchmarks.run_health detect   # stopped, looping, stuck in a worker, a collective left out: 20 cases
python -m benchmarks.run_health slow     # a rank throttled by a fifth, from outside, with SIGSTOP and SIGCONT
python -m benchmarks.run_health bit      # one bit of one rank's weights
python -m benchmarks.run_health soak     # 5,000 steps with validation, saves and a long batch: no alarm
python -m benchmarks.run_health cost     # process CPU time a step, plain Lightning against ours
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from benchmarks.rows import show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.forked import ForkedRanks
from harness.runs import QUIET, quiet_lightning
from harness.timing import ratio
from lightning_eff.callbacks import FaultInjector, RunHealth

SIZES = {
    "0.1 M": GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=64),
    "0.85 M": GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128),
    "10.8 M": GPTConfig(block_size=64, n_layer=6, n_head=6, n_embd=384),
}
HANG = 3.0  # seconds
AT = 40  # the step of a fault
PHASES = {"stop": "FaultInjector", "loop": "forward", "worker": "data", "left_out": "waiting"}
WARM = 40


class Bytes(Dataset[torch.Tensor]):
    """Random bytes; in a worker, one of them may never come."""

    def __init__(self, block_size: int, stuck_at: int | None = None) -> None:
        self.data = torch.randint(0, 256, (4096, block_size + 1), generator=torch.Generator().manual_seed(0))
        self.stuck_at = stuck_at
        self.rank = os.getpid()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        while self.stuck_at is not None and index >= self.stuck_at:
            time.sleep(0.1)
            if os.getppid() != self.rank:  # which has been killed
                os._exit(1)
        return self.data[index]


class Module(L.LightningModule):
    """A byte GPT, with the faults that are no callback's."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SIZES[settings["size"]]
        self.model = GPT(self.config)
        self.settings = settings
        self.group: Any = None

    def _is(self, fault: str) -> bool:
        return self.settings.get("fault") == fault and self.global_rank == self.settings["victim"]

    def on_fit_start(self) -> None:
        if self.settings.get("fault") == "left_out":
            self.group = dist.new_group(backend="gloo")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        at = self.global_step == AT
        if at and self._is("loop"):
            print("FAULT", flush=True)
            while True:
                time.sleep(0)
        if at and self.settings.get("fault") == "left_out":
            if self._is("left_out"):
                print("FAULT", flush=True)
            else:
                dist.barrier(group=self.group)
        if self.settings.get("long_batch") == self.global_step:
            for _ in range(9):
                self._loss(batch).backward()
        return self._loss(batch)

    def _loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        stuck = 4 * AT if self._is("worker") else None
        workers = 1 if self.settings.get("fault") == "worker" else 0
        return DataLoader(Bytes(self.config.block_size, stuck), batch_size=4, num_workers=workers)

    def val_dataloader(self) -> Any:
        return DataLoader(Bytes(self.config.block_size), batch_size=4)


class Steps(L.Callback):
    """Process CPU time and wall-clock of each step; a step's number for whoever looks from outside."""

    def __init__(self, folder: str) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())
        if trainer.global_step == AT and trainer.is_global_zero:
            Path(self.folder, "at").touch()


def train(settings: dict[str, Any]) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    quiet_lightning()
    folder, rank = settings["folder"], int(os.environ["RANK"])
    steps = Steps(folder)
    callbacks: list[L.Callback] = [steps]
    health = RunHealth(**{"folder": folder, "hang_seconds": HANG, "first_seconds": 60.0, **settings.get("health", {})})
    if settings.get("ours", True):
        callbacks.append(health)
    if settings.get("fault") in ("stop", "corrupt"):
        callbacks.append(FaultInjector(settings["fault"], AT, settings["victim"]))
    if settings.get("saves"):
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=settings["saves"], save_top_k=1))
    quiet = {**QUIET, "enable_checkpointing": bool(settings.get("saves"))}
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", use_distributed_sampler=False,
        callbacks=callbacks, num_sanity_val_steps=0, default_root_dir=folder,
        **{**quiet, "max_steps": 1000, "limit_val_batches": 0, **settings.get("trainer", {})},
    )  # fmt: skip
    trainer.fit(Module(settings))
    figures = {name: _each(times) for name, times in (("cpu", steps.cpu), ("wall", steps.wall))}
    told = {
        "findings": [(step, vars(finding)) for step, finding in health.findings],
        "differences": health.differences,
        "verdicts": len(health.verdicts),
        **figures,
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(told))


def _each(times: list[float]) -> float:
    return (times[-1] - times[WARM]) / (len(times) - 1 - WARM)


def run(ranks: int, watch: Any = None, **settings: Any) -> list[dict[str, Any]]:
    """What each rank has told at its end; ``watch`` is called meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        with ForkedRanks(ranks, Path(folder), train, {"folder": folder, **settings}) as forked:
            if watch is not None:
                watch(forked)
            forked.wait(3600)
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _until(forked: ForkedRanks, pattern: str, seconds: float) -> tuple[float, re.Match[str]]:
    """When the ranks have printed something, and what."""
    deadline = time.monotonic() + seconds
    while (found := re.search(pattern, forked.text(), re.DOTALL)) is None:
        if time.monotonic() > deadline or not forked.running():
            raise RuntimeError(f"{pattern!r} did not come:\n{forked.text()}")
        time.sleep(0.01)
    return time.monotonic(), found


def detect() -> None:
    rows = []
    for ranks in (2, 3):
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
    write_rows("run_health_detect", rows)


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


def slow(steps: int) -> None:
    rows = []
    for victim in (0, 1):
        found = run(2, lambda forked, v=victim: _throttle(forked, v, 0.2), size="0.85 M", trainer={"max_steps": steps})
        first = next(((step, one) for step, one in found[0]["findings"] if one["rank"] == victim), None)
        others = [one for _, one in found[0]["findings"] if one["rank"] != victim]
        rows.append(
            {
                "ranks": 2,
                "victim": victim,
                "throttled_by": 0.2,
                "named_after_steps": None if first is None else first[0] - AT,
                "slower": None if first is None else round(first[1]["slower"], 3),
                "phase": None if first is None else first[1]["phase"],
                "others_named": len(others),
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
        "differences_reported": len(found[0]["differences"]),
        "ms_a_step": round(1000 * found[0]["wall"], 1),
        "load": round(os.getloadavg()[0], 1),
    }
    show("False alarms", [row])
    write_rows("run_health_soak", [row], key=("steps", "busy_processes_beside"))


def cost(size: str, rounds: int, steps: int) -> None:
    figures: dict[str, dict[str, list[float]]] = {"cpu": {}, "wall": {}}
    for turn in range(rounds):
        for ours in (bool(turn % 2), not turn % 2):
            name = "RunHealth" if ours else "Lightning"
            found = run(2, size=size, ours=ours, trainer={"max_steps": steps})
            for kind in figures:
                figures[kind].setdefault(name, []).append(statistics.mean(rank[kind] for rank in found))
    rows = []
    for name in ("Lightning", "RunHealth"):
        middle, low, high = ratio(figures["cpu"], name, "Lightning")
        wall, *_ = ratio(figures["wall"], name, "Lightning")
        rows.append(
            {
                "size": size,
                "run": name,
                "ranks": 2,
                "steps": steps,
                "rounds": rounds,
                "cpu_ms_a_step": round(1000 * statistics.median(figures["cpu"][name]), 3),
                "cpu_ratio": round(middle, 4),
                "cpu_ratio_low": round(low, 4),
                "cpu_ratio_high": round(high, 4),
                "wall_ratio": round(wall, 4),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    show(f"An ordinary step, {size}", rows)
    write_rows("run_health_cost", rows, key=("size", "run"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["detect", "slow", "bit", "soak", "cost"])
    parser.add_argument("--size", choices=list(SIZES), default="0.85 M")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--beside", type=int, default=0, help="processes that keep a core busy beside the soak")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if arguments.what == "slow":
        slow(arguments.steps or 200)
    elif arguments.what == "soak":
        soak(arguments.steps or 5000, arguments.beside)
    elif arguments.what == "cost":
        cost(arguments.size, arguments.rounds, arguments.steps or 220)
    else:
        {"detect": detect, "bit": bit}[arguments.what]()
