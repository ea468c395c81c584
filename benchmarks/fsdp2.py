"""FSDP2 by name: its losses against DDP's, its memory, and how long a sharded save keeps training waiting.

python -m benchmarks.fsdp2 architectures   # the largest difference of a step's loss to DDP's, twelve small models
python -m benchmarks.fsdp2 memory          # bytes that a rank holds, against the formula
python -m benchmarks.fsdp2 saves           # seconds and CPU seconds of `save_checkpoint`, against synchronous DCP
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from benchmarks.fsdp2_models import ZOO
from benchmarks.rows import show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.pool import Pool
from harness.runs import fit, seed_everything
from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.strategies import FSDP2Strategy
from lightning_eff.training.dtensor import local
from lightning_eff.training.optimizer_state import state_bytes

RANKS = 2
OPTIONS: dict[str, Any] = {"devices": RANKS, "num_sanity_val_steps": 0}


class Module(L.LightningModule):
    """A byte GPT on random bytes."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.model = GPT(GPTConfig(block_size=32, n_layer=layers, n_head=4, n_embd=width))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randint(0, 256, (4096, 33)), batch_size=2)


def _losses(name: str, strategy: str) -> torch.Tensor:
    seed_everything(1)
    module = ZOO[name]()
    fit(module, strategy=strategy, max_steps=-1, max_epochs=3, limit_val_batches=0, **OPTIONS)
    return torch.stack(module.losses)


def _against_ddp() -> list[dict[str, Any]]:
    rows = []
    for name, cls in ZOO.items():
        ddp, ours = (_losses(name, strategy) for strategy in ("ddp_find_unused_parameters_true", "fsdp2"))
        worst = ((ours - ddp).abs() / ddp.abs()).max().item()
        what = (cls.__doc__ or "").strip().split("\n")[0]
        rows.append({"architecture": name, "what": what, "steps": len(ddp), "largest_relative_difference": worst})
    return rows


class Memory(L.Callback):
    """Bytes on this rank: weights and gradients at rest, moments, and the most that is gathered in a forward pass."""

    gathered = rest = moments = gradients = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for block in pl_module.model.blocks:
            next(block.children()).register_forward_pre_hook(lambda *_: self._note(pl_module))

    def _note(self, module: Any) -> None:
        self.gathered = max(self.gathered, sum(4 * p.numel() for p in module.parameters() if not is_dtensor(p)))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients = sum(4 * local(p.grad).numel() for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.rest = sum(4 * local(p).numel() for p in pl_module.parameters())
        self.moments = state_bytes(trainer.optimizers)


def _memory(layers: int, width: int) -> dict[str, Any]:
    module, memory = Module(layers, width), Memory()
    count = sum(p.numel() for p in module.parameters())
    block = sum(p.numel() for p in module.model.blocks[0].parameters())
    fit(module, memory, strategy="fsdp2", max_steps=2, **OPTIONS)
    return {
        "layers": layers, "width": width, "parameters": count, "ranks": RANKS,
        "weights": memory.rest, "gradients": memory.gradients, "moments": memory.moments,
        "formula_16_p_over_n": 16 * count // RANKS,
        "gathered": memory.gathered, "formula_rest_and_a_block": 4 * (count - (layers - 1) * block),
    }  # fmt: skip


class Saves(L.Callback):
    """How long and how much CPU time of the training thread each save takes, from the state dicts to its return."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.thread_time()
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            trainer.strategy.save_checkpoint(checkpoint, self.folder / f"{trainer.global_step}.ckpt")
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.thread_time() - cpu)


def _saves(folder: Path, layers: int, width: int, saves: int, every: int) -> list[dict[str, Any]]:
    rows = []
    for turn, later in enumerate((False, True)):
        seed_everything(1)
        module, callback = Module(layers, width), Saves(folder / str(turn), every)
        began = time.perf_counter()
        strategy = FSDP2Strategy(async_save=later)
        fit(module, callback, strategy=strategy, max_steps=saves * every, **OPTIONS)
        size = sum(file.stat().st_size for file in next((folder / str(turn)).iterdir()).iterdir())
        rows.append(
            {
                "run": "ours, async_save" if later else "Lightning's, synchronous DCP",
                "ranks": RANKS, "megabytes": round(size / 1e6, 1), "saves": saves,
                "first_s": round(callback.wall[0], 4), "median_s": round(statistics.median(callback.wall[2:]), 4),
                "most_s": round(max(callback.wall[2:]), 4),
                "median_cpu_s_of_the_thread": round(statistics.median(callback.cpu[2:]), 4),
                "run_s": round(time.perf_counter() - began, 2),
            }
        )  # fmt: skip
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / str(turn))
        dist.barrier()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["architectures", "memory", "saves"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    given = parser.parse_args()
    with Pool(RANKS) as pool, tempfile.TemporaryDirectory() as folder:
        long = pool.using(time_limit=3600)
        if given.what == "architectures":
            rows = long.run(_against_ddp)[0]
        elif given.what == "memory":
            rows = [long.run(_memory, layers, width)[0] for layers, width in ((4, 128), (8, 320))]
        else:
            rows = long.run(_saves, Path(folder), given.layers, given.width, given.saves, given.every)[0]
    show(f"FSDP2: {given.what}, two gloo ranks", rows)
    write_rows(f"fsdp2_{given.what}", rows)


if __name__ == "__main__":
    main()
