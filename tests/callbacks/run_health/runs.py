"""Small runs with faults on several ranks, one after the other, as a script: nothing is imported twice."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from harness.forked import ForkedRanks
from harness.runs import QUIET, quiet_lightning
from lightning_eff.callbacks import FaultInjector, RunHealth

STEP = 0.02  # seconds that a forward pass takes


class Data(Dataset):
    """Whose items are there at once; one of them may never come."""

    def __init__(self, stuck_at: int | None = None) -> None:
        self.stuck_at = stuck_at
        self.rank = os.getpid()

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        while self.stuck_at is not None and index >= self.stuck_at:
            time.sleep(0.1)
            if os.getppid() != self.rank:  # which has been killed
                os._exit(1)
        return torch.full((4,), index / 4000)


class Model(L.LightningModule):
    """A step takes what it sleeps; the faults that no callback can inject are here."""

    def __init__(self, fault: str, rank: int, at: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.fault, self.rank, self.at = fault, rank, at
        self.group: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        mine = self.global_rank == self.rank
        time.sleep(5 * STEP if self.fault == "slow" else STEP)  # nobody is judged by less than five seconds
        if self.fault == "loop" and mine and self.global_step == self.at:
            while True:
                time.sleep(0.001)
        if self.fault == "left_out" and self.global_step == self.at and not mine:
            dist.barrier(group=self.group)
        return self.net(batch).square().mean()

    def on_fit_start(self) -> None:
        if self.fault == "left_out":
            self.group = dist.new_group(backend="gloo")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        stuck = 2 * self.at if self.fault == "worker" and self.global_rank == self.rank else None
        sampler = list(range(4000))
        return DataLoader(Data(stuck), batch_size=2, sampler=sampler, num_workers=1 if self.fault == "worker" else 0)

    def val_dataloader(self) -> Any:
        return DataLoader(Data(), batch_size=1000)


def train(settings: dict[str, Any]) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    quiet_lightning()
    os.environ |= settings.get("environ", {})
    rank, fault, victim, at = int(os.environ["RANK"]), settings["fault"], settings["rank"], settings["at"]
    health = RunHealth(**{"folder": settings["folder"], "weights_every_n_steps": None, **settings.get("health", {})})
    callbacks: list[L.Callback] = [health]
    if fault in ("stop", "hang", "kill", "slow", "corrupt", "raise"):
        callbacks.append(FaultInjector(fault, at, victim, **settings.get("injector", {})))
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=settings.get("strategy", "ddp"),
        use_distributed_sampler=False, default_root_dir=settings["folder"], num_sanity_val_steps=0,
        callbacks=callbacks, **{**QUIET, "max_steps": 400, "limit_val_batches": 0, **settings.get("trainer", {})},
    )  # fmt: skip
    collected: list[int] = []  # steps in which garbage was, behind what RunHealth does at the start
    gc.callbacks.append(lambda when, _: collected.append(trainer.global_step) if when == "stop" else None)
    trainer.fit(Model(fault, victim, at))
    gc.callbacks.pop()
    told = {
        "step": trainer.global_step,
        "findings": [(step, vars(finding)) for step, finding in health.findings],
        "differences": health.differences,
        "times": health.times(),
        "sent": health._exchange.sent,
        "collected": sorted({step for step in collected if 0 < step < trainer.global_step}),
    }
    Path(settings["folder"], f"rank{rank}.json").write_text(json.dumps(told))


def main(scenarios: list[dict[str, Any]]) -> None:
    """Each on ranks of its own; what came of it is written beside what they printed."""
    for settings in scenarios:
        folder = Path(settings["folder"])
        with ForkedRanks(settings["ranks"], folder, train, settings) as ranks:
            ranks.wait(stopped=[settings["rank"]] if settings["fault"] == "stop" else [])
            told = {"status": list(ranks.status.values()), "text": ranks.text(), "pids": ranks.pids}
        (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
