"""Runs that `benchmarks.run_health` measures: a small GPT under DDP, with faults that are no callback's."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from examples.gpt.model import GPT, GPTConfig
from harness.alternating import Alternating
from harness.forked import ForkedRanks
from harness.runs import QUIET, quiet_lightning
from lightning_eff.callbacks import FaultInjector, RunHealth

SIZES = {
    "0.01 M": GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=16),
    "0.1 M": GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=64),
    "0.85 M": GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128),
    "1 M": GPTConfig(block_size=256, n_layer=5, n_head=4, n_embd=128),  # of examples/gpt/configs
    "10.8 M": GPTConfig(block_size=64, n_layer=6, n_head=6, n_embd=384),
    # As many modules and tensors, and a step so short that the difference can be told from its noise.
    "1 M, narrow": GPTConfig(block_size=16, n_layer=5, n_head=4, n_embd=16),
    "10.8 M, narrow": GPTConfig(block_size=16, n_layer=6, n_head=6, n_embd=24),
}
HANG = 3.0  # seconds
AT = 40  # the step of a fault
WARM = 40
EVERY = 10  # steps of a window, which is the default
BATCH = 4  # sequences a rank
PLAIN, OURS = "Lightning", "RunHealth"


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
        batch = self.settings.get("batch", BATCH)
        return DataLoader(Bytes(self.config.block_size, stuck), batch_size=batch, num_workers=workers)

    def val_dataloader(self) -> Any:
        return DataLoader(Bytes(self.config.block_size), batch_size=4)


class Steps(L.Callback):
    """Wall-clock of each step; a step's number for whoever looks from outside; CPU time of the watchdog's thread."""

    def __init__(self, folder: str, health: Any) -> None:
        self.wall: list[float] = []
        self.folder = folder
        self.health = health
        self.watchdog = (0.0, 0.0)  # seconds of CPU time, and of all time, between the first steps and the end

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.wall.append(time.perf_counter())
        if len(self.wall) == WARM:
            self.watchdog = self._watchdog()
        if trainer.global_step == AT and trainer.is_global_zero:
            Path(self.folder, "at").touch()

    def on_train_end(self, *_: Any) -> None:
        cpu, wall = self._watchdog()
        self.watchdog = cpu - self.watchdog[0], wall - self.watchdog[1]

    def _watchdog(self) -> tuple[float, float]:
        thread = self.health._watchdog._thread.ident
        return time.clock_gettime(time.pthread_getcpuclockid(thread)), time.perf_counter()

    def seconds(self) -> float:
        return (self.wall[-1] - self.wall[WARM]) / (len(self.wall) - 1 - WARM)


class Arms:
    """A Trainer with the callback and without; its thread runs on, and what that costs is asked of the thread."""

    def __init__(self, health: Any) -> None:
        self.health = health
        self.callbacks: list[Any] = []

    def plain(self, trainer: Any) -> None:
        self.callbacks = trainer.callbacks
        self.health._phases.detach()
        trainer.callbacks = [each for each in self.callbacks if each is not self.health]

    def ours(self, trainer: Any) -> None:
        self.health._phases.attach(trainer)
        self.health._phases.listen_to(trainer.lightning_module)
        trainer.callbacks = self.callbacks


def train(settings: dict[str, Any]) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    quiet_lightning()
    folder, rank = settings["folder"], int(os.environ["RANK"])
    health = RunHealth(**{"folder": folder, "hang_seconds": HANG, "first_seconds": 60.0, **settings.get("health", {})})
    steps = Steps(folder, health)
    callbacks: list[L.Callback] = [steps, health]
    arms = Arms(health)
    # Five steps behind the first ones, so that what happens at the end of a window does so in the midst of a block.
    turns = Alternating({OURS: arms.ours, PLAIN: arms.plain}, block=EVERY, warm=WARM + EVERY // 2)
    if settings.get("turns"):
        callbacks.append(turns)
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
    told = {
        "findings": [(step, vars(finding)) for step, finding in health.findings],
        "differences": health.differences,
        "verdicts": len(health.verdicts),
        "seconds": steps.seconds(),
        "hash_seconds": _hash_seconds(health),
        "watchdog": steps.watchdog[0] / steps.watchdog[1],
        **turns.figures(),
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(told))


def _hash_seconds(health: Any) -> float:
    """Process CPU time of one comparison of weights."""
    begun = time.process_time()
    health._hash.take()
    health._hash.halves()
    return time.process_time() - begun


def run(ranks: int, watch: Any = None, **settings: Any) -> list[dict[str, Any]]:
    """What each rank has told at its end; ``watch`` is called meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        with ForkedRanks(ranks, Path(folder), train, {"folder": folder, **settings}) as forked:
            if watch is not None:
                watch(forked)
            forked.wait(3600)
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]
