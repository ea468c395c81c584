"""FSDP2 by name: its losses against DDP's, its memory, and how long a sharded save keeps training waiting.

python -m benchmarks.fsdp2 architectures   # the largest difference of a step's loss to DDP's, twelve small models
python -m benchmarks.fsdp2 memory          # bytes that a rank holds, against the formula
python -m benchmarks.fsdp2 saves           # seconds and CPU seconds of a save, against synchronous DCP
python -m benchmarks.fsdp2 saves --run 2   # the third of its runs alone, where a machine is quiet for minutes only
python -m benchmarks.fsdp2 lines           # what a user writes, by hand and with this suite
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
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from benchmarks import fsdp2_lines
from benchmarks.fsdp2_models import ZOO
from benchmarks.rows import show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.pool import Pool
from harness.runs import fit, fsdp2, seed_everything
from harness.timing import add_time_of, seconds_of_a_copy
from lightning_eff.callbacks import AsyncCheckpoint
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


class ByHand(Module):
    """Shards itself as Lightning's strategy asks for."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Saves(L.Callback):
    """How long and how much CPU time of the training thread each save takes, from the state dicts to its return, and
    with it what the next step waits for its copies."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.wall: list[float] = []
        self.waits: list[float] = []
        self.cpu: list[float] = []
        self.steps: list[float] = []
        self._mark = 0.0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        saves = getattr(trainer.strategy, "sharded_saves", None)
        if saves is not None:
            clocks = (self.wall, time.perf_counter), (self.cpu, time.thread_time), (self.waits, time.perf_counter)
            add_time_of(saves, "settle", *clocks)
            add_time_of(saves.overlap, "time_is_over", *clocks)

    def on_train_batch_start(self, *_: Any) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self._mark)
        if trainer.global_step % self.every == 0:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.thread_time()
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.thread_time() - cpu)
            self.waits.append(0.0)


RUNS: dict[str, tuple[type[Module], Any, Any]] = {
    "Lightning, synchronous DCP": (ByHand, fsdp2, list),
    "fsdp2": (Module, FSDP2Strategy, list),
    "Lightning's strategy with AsyncCheckpoint": (ByHand, fsdp2, lambda: [AsyncCheckpoint()]),
}


def _saves(folder: Path, name: str, layers: int, width: int, saves: int, every: int) -> dict[str, Any]:
    module, strategy, callbacks = RUNS[name]
    seed_everything(1)
    callback = Saves(folder, every)
    began = time.perf_counter()
    fit(module(layers, width), *callbacks(), callback, strategy=strategy(), max_steps=saves * every, **OPTIONS)
    size = sum(file.stat().st_size for file in next(folder.iterdir()).iterdir())
    took = time.perf_counter() - began
    copy = seconds_of_a_copy(size // RANKS, before=dist.barrier)
    dist.barrier()
    return {
        "run": name, "ranks": RANKS, "megabytes": round(size / 1e6, 1), "saves": saves,
        "first_s": round(callback.wall[0], 4), "median_s": round(statistics.median(callback.wall[2:]), 4),
        "most_s": round(max(callback.wall[2:]), 4),
        "of_it_in_the_next_step_s": round(statistics.median(callback.waits[2:]), 4),
        "median_cpu_s_of_the_thread": round(statistics.median(callback.cpu[2:]), 4),
        "median_step_s": round(statistics.median(callback.steps[1:]), 4), "run_s": round(took, 2),
        "bare_copy_s": round(copy, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["architectures", "memory", "saves", "lines"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--run", type=int, choices=range(len(RUNS)), help="of the saves; by default all")
    given = parser.parse_args()
    with Pool(RANKS) as pool, tempfile.TemporaryDirectory() as folder:
        long = pool.using(time_limit=3600)
        if given.what == "architectures":
            rows = long.run(_against_ddp)[0]
        elif given.what == "memory":
            rows = [long.run(_memory, layers, width)[0] for layers, width in ((4, 128), (8, 320))]
        elif given.what == "lines":
            rows = long.run(fsdp2_lines.rows, Path(folder))[0]
        else:
            rows = []
            for index, name in enumerate(RUNS):
                if given.run in (None, index):
                    size = given.layers, given.width, given.saves, given.every
                    rows += long.run(_saves, Path(folder, str(index)), name, *size)[:1]
                    shutil.rmtree(Path(folder, str(index)))
    show(f"FSDP2: {given.what}, two gloo ranks", rows)
    write_rows(f"fsdp2_{given.what}", rows, key=("run",) if given.what == "saves" else ())


if __name__ == "__main__":
    main()
