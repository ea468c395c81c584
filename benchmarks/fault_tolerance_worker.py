"""One replica of the runs that `benchmarks.fault_tolerance` measures: the example GPT, every step written down."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from benchmarks.gpt import train
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from harness import json_lines
from harness.memory import resident
from harness.runs import begin
from lightning_eff.strategies import FaultTolerantDDPStrategy

PHASES = ["forward", "backward", "update", "between steps"]
"""Where a replica may be killed."""

MALLINFO2 = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]


def memory_in_use() -> int:
    """Bytes that the allocator has given out, without those that it keeps for later; glibc's count."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class WithDropout(GPTModule):
    """The example has none, and a takeover must draw the same masks."""

    def __init__(self, config: GPTConfig, dropout: float, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        if dropout > 0:
            for block in self.model.blocks:
                block.mlp = nn.Sequential(block.mlp, nn.Dropout(dropout))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model.loss(batch)
        diary = next(callback for callback in self.trainer.callbacks if isinstance(callback, Diary))
        diary.die_in("forward")
        loss.register_hook(lambda _: diary.die_in("backward"))
        self.log("train_loss", loss, batch_size=len(batch), sync_dist=True)
        return loss


class Manual(WithDropout):
    """The same in manual optimization."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Diary(L.Callback):
    """A line for the start of the process, and one for each optimizer step."""

    def __init__(self, settings: dict[str, Any], replica: int) -> None:
        self.path = Path(settings["folder"]) / f"steps-{replica}.jsonl"
        self.death = Path(settings["folder"]) / f"die-{replica}"
        self.quorum: tuple[float, float] = (0.0, 0.0)
        """When the replica last asked for one, and when it had it."""
        self.write(event="start")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        manager: Any = getattr(getattr(trainer.strategy, "replicas", None), "manager", None)
        if manager is None:
            return
        ask = manager.ask_for_quorum

        def timed(newcomers: bool, timeout: float) -> None:
            began = time.time()
            ask(newcomers, timeout)
            self.quorum = (began, time.time())

        manager.ask_for_quorum = timed

    def write(self, **line: Any) -> None:
        json_lines.append(self.path, {"time": time.time(), "pid": os.getpid(), **line})

    def die_in(self, phase: str) -> None:
        """If that was asked for."""
        with suppress(OSError):
            if self.death.read_text() == phase:
                self.death.unlink()
                self.write(event="death")
                os.kill(os.getpid(), signal.SIGKILL)

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.die_in("update")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        replicas = getattr(trainer.strategy, "replicas", None)
        self.write(
            event="step",
            step=trainer.global_step,
            loss=float(trainer.callback_metrics["train_loss"]),
            members=replicas.members if replicas is not None else None,
            aborts=replicas.aborts if replicas is not None else 0,
            quorum=self.quorum,
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            resident=resident(),
            in_use=memory_in_use(),
        )
        self.die_in("between steps")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total = sum(float(p.double().abs().sum()) for p in module.parameters())
        self.write(event="end", step=trainer.global_step, weights=total.hex())


def main() -> None:
    settings = json.loads(os.environ["FAULT_TOLERANCE_BENCHMARK"])
    begin(0)
    fault_tolerant = settings["strategy"] == "ddp_ft"
    processes = settings.get("processes", 1) if fault_tolerant else int(os.environ["WORLD_SIZE"])
    replica = int(os.environ["RANK"])
    if fault_tolerant:
        replica += processes * int(os.environ["REPLICA_GROUP_ID"])
    strategy: Any = "ddp"
    if fault_tolerant:
        strategy = FaultTolerantDDPStrategy(on_failure="takeover", collective_timeout=60.0)
    callbacks: list[L.Callback] = [Diary(settings, replica)]
    if settings.get("save_every"):
        folder = Path(settings["folder"]) / "checkpoints"
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=settings["save_every"], save_last=True))
    kind = Manual if settings.get("manual") else WithDropout
    model = kind(GPTConfig(**settings["model"]), settings.get("dropout", 0.0), schedule="constant")
    data = TextDataModule(block_size=256, batch_size=settings["batch_size"], num_workers=settings.get("workers", 0))
    train(
        model,
        data,
        *callbacks,
        ckpt_path="last" if settings.get("save_every") else None,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_steps=settings["steps"],
        max_epochs=-1,
        accumulate_grad_batches=settings.get("accumulate", 1),
    )


if __name__ == "__main__":
    main()
