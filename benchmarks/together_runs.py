"""A run with the whole suite in one Trainer: what tests/together and benchmarks/together.py train, kill and compare.

Everything that can differ between a run and its resume is in it: random crops and noise made in data workers, dropout,
accumulation over two batches, bfloat16, a validation within the epoch, and batches that are bad.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.defaults_models import ViT
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from harness.runs import quiet_lightning, quiet_trainer, seed_everything
from lightning_eff.callbacks import (
    EMA,
    AsyncCheckpoint,
    CheckpointAveraging,
    ExactResume,
    ExplodingLoss,
    GradES,
    GradientStats,
    NonFiniteLoss,
    Preemption,
    RunHealth,
    SpectralAlignmentMonitor,
    TensorBoardLayout,
    TrainingGuard,
    ZClip,
)
from lightning_eff.strategies import ArcTopK, CompressedDDPStrategy, FaultTolerantDDPStrategy
from lightning_eff.training.dtensor import local

RANKS = {"single": 1, "ddp": 2, "fsdp2": 2, "ddp_arc_topk": 2, "ddp_ft": 3}
"""Processes, by strategy."""

REFUSED: dict[str, dict[str, str]] = {
    "ddp_ft": {"TrainingGuard": "its rollback is refused there: each replica would go back by itself"},
}
"""By strategy the callbacks that are left out there, and why."""


def callbacks(strategy: str, without: Collection[str] = ()) -> list[L.Callback]:
    """All of them, such that each acts within some tens of steps; the names are those of the classes."""
    rules = [NonFiniteLoss(patience=2), ExplodingLoss(over_n_steps=8)]
    found = [
        ZClip(warmup_steps=6),
        GradES(tau=0.9, alpha=0.1, every_n_steps=3, patience=2, max_frozen_ratio=0.5, max_events=3),
        EMA(decay=0.9, validate_with="average"),
        CheckpointAveraging(window=3, every_n_steps=4),
        SpectralAlignmentMonitor(every_n_steps=4),
        TrainingGuard(rules=rules, every_n_steps=4, keep=4, margin=3, read_every_n_steps=2, lr_steps=8),
        RunHealth(every_n_steps=3, weights_every_n_steps=6),
        GradientStats(every_n_steps=5),
        ExactResume(),
        Preemption(every_n_steps=3),
        AsyncCheckpoint(on_error="warn", retries=3, retry_seconds=0.2),
        TensorBoardLayout(),
    ]
    left_out = {*without, *REFUSED.get(strategy, {})}
    return [each for each in found if type(each).__name__ not in left_out]


SAID = (
    "SpectralAlignmentMonitor",
    "ZClip. the mean gradient norm",
    "TrainingGuard",
    "Checkpoint directory",
    "The dirpath has changed",
    r".fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",
)
"""How warnings begin that say nothing here."""


def usual_callbacks() -> list[L.Callback]:
    """All of them, with their default arguments."""
    return [
        *(ZClip(), GradES(), EMA(decay=0.999), CheckpointAveraging(), SpectralAlignmentMonitor(), TrainingGuard()),
        *(RunHealth(), GradientStats(), ExactResume(), Preemption(), AsyncCheckpoint(), TensorBoardLayout()),
    ]


@dataclass
class Settings:
    """Of one life of a run; what is to be the same in all of its lives stands first."""

    folder: Path
    strategy: str = "single"
    model: str = "gpt"
    ranks: int | None = None
    """None for those of `RANKS`."""

    steps: int = 20
    """Of the optimizer, that are not undone."""

    save_every: int = 5
    """Steps between two checkpoints."""

    workers: int = 0
    bad: dict[int, float] = field(default_factory=dict)
    """Batch number -> what its loss is multiplied by; NaN or a large number."""

    without: tuple[str, ...] = ()
    """Callbacks to leave out."""

    precision: Any = "bf16-mixed"
    resume: str | None = "last"
    """From the last checkpoint in the folder, if there is one, as a user's script does; or a path."""

    notes: Path | None = None
    """A folder for what it notes down, on a disk that is never full; None for the first one."""

    pause: float = 0.0
    """Seconds of sleep in each batch, so that something else can come between."""

    @property
    def beside(self) -> Path:
        return self.notes or self.folder


class Noisy(Dataset[Any]):
    """Another dataset, with noise of the generators of whoever loads it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        found = self.data[index]
        if isinstance(found, Tensor):  # bytes of text: one of them is another
            found = found.clone()
            found[int(torch.randint(len(found), ()))] = int(torch.randint(256, ()))
            return found
        return found[0] + 0.1 * torch.randn(found[0].shape), found[1]


class Text(TextDataModule):
    """Crops of this repository's own examples, with noise. Its loader keeps its place by itself."""

    def __init__(self, workers: int) -> None:
        root = Path(__file__).parents[1] / "examples"
        super().__init__(
            root, block_size=24, batch_size=4, crops_per_epoch=144, val_fraction=0.3, val_windows=16,
            num_workers=workers,
        )  # fmt: skip

    def setup(self, stage: str | None = None) -> None:
        if self.train_data is None:
            super().setup(stage)
            self.train_data = Noisy(self.train_data)  # type: ignore[assignment]


class Digits(L.LightningDataModule):
    """The digits, shuffled by Lightning's own loader, with noise."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def setup(self, stage: str | None = None) -> None:
        from examples.digits.data import DigitsDataModule

        digits = DigitsDataModule(batch_size=4)
        digits.setup()
        self.train = Noisy(torch.utils.data.Subset(digits.train_data, range(144)))  # type: ignore[arg-type]
        self.val = torch.utils.data.Subset(digits.val_data, range(16))  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=4, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=4)


class Module(L.LightningModule):
    """Either model; logs what a user logs."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        torch.manual_seed(1)
        shape = GPTConfig(block_size=24, n_layer=2, n_head=2, n_embd=16)
        self.net = GPT(shape) if settings.model == "gpt" else ViT(width=16, hidden=32, blocks=2, dropout=0.1)
        self.drop = nn.Dropout(0.1)

    def loss(self, batch: Any) -> Tensor:
        if isinstance(self.net, GPT):
            batch = batch.long()
            logits = self.drop(self.net(batch[:, :-1]))
            return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self.settings.pause)
        loop = self.trainer.fit_loop.epoch_loop
        number = loop.total_batch_idx - loop.batch_idx + batch_idx  # ddp_ft runs others of the epoch beside the loop's
        loss = self.loss(batch) * self.settings.bad.get(number, 1.0)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=4, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 8))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Diary(L.Callback):
    """One line for each batch that is behind, of this process's run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        line = {"batch": loop.total_batch_idx, "step": trainer.global_step, "loss": float(outputs["loss"])}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def build_strategy(name: str) -> Any:
    """Of the Trainer; ``ddp_arc_topk`` compresses models as small as these."""
    if name == "ddp_arc_topk":
        return CompressedDDPStrategy(ArcTopK(ratio=0.5, rank=1, min_numel=64, error_feedback="ef14"))
    if name == "ddp_ft":
        return FaultTolerantDDPStrategy(
            collective_timeout=30.0, connect_timeout=20.0, quorum_timeout=90.0, start_grace=60.0
        )
    return "auto" if name == "single" else name


def saver(settings: Settings) -> Checkpoint:
    """As a user has it: the two best, and the last."""
    return ModelCheckpoint(
        settings.folder / "checkpoints", filename="{step}", every_n_train_steps=settings.save_every,
        monitor="loss_step", mode="min", save_top_k=2, save_last=True,
    )  # fmt: skip


def train(settings: Settings, *others: L.Callback) -> dict[str, Any]:
    """One life of this rank, with other callbacks beside; its ``outcome``, which is in ``final-<rank>.pt`` too."""
    torch.set_num_threads(1)
    quiet_lightning(*SAID)
    rank = int(os.environ.get("REPLICA_GROUP_ID", os.environ.get("RANK", 0)))
    seed_everything(7)  # all ranks draw alike
    module = Module(settings)
    folder = settings.folder
    replicas = settings.strategy == "ddp_ft"
    trainer = quiet_trainer(
        *callbacks(settings.strategy, settings.without),
        *others,
        Diary(settings.beside / f"diary-{rank}.jsonl"),
        saver(settings),
        accelerator="cpu",
        devices=1 if replicas else settings.ranks or RANKS[settings.strategy],
        strategy=build_strategy(settings.strategy),
        precision=settings.precision,
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=None if replicas else 7,
        log_every_n_steps=3,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(settings.beside, name="tb", version=""),
        default_root_dir=folder,
    )
    data = Text(settings.workers) if settings.model == "gpt" else Digits(settings.workers)
    trainer.fit(module, datamodule=data, ckpt_path=settings.resume)
    found = outcome(trainer, module)
    part = settings.beside / f"final-{rank}.pt.part"
    torch.save(found, part)
    part.rename(settings.beside / f"final-{rank}.pt")
    return found


def outcome(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """What two runs that are the same have in common: this rank's part of it."""
    states = {type(each).__name__: here(each.state_dict()) for each in trainer.callbacks if each.state_dict()}
    for name in ("ModelCheckpoint", "TensorBoardLayout", "RunHealth"):  # paths, and seconds
        states.pop(name, None)
    return {
        "step": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.total_batch_idx,
        "parameters": here(dict(module.named_parameters())),
        "trained": [name for name, weight in module.named_parameters() if weight.requires_grad],
        "optimizers": [here(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "callbacks": states,
        "metrics": {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.startswith(("run_health/", "ft/"))
        },
    }


def here(value: Any) -> Any:
    """Copies of this rank's tensors and shards, on the CPU."""
    if isinstance(value, dict):
        return {key: here(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(here(entry) for entry in value)
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    return value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two outcomes differ, in words; every bit counts, and NaN is equal to NaN."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} against {type(other).__name__}"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one))} against {sorted(map(str, other))}"]
        return [text for key in one for text in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} against {len(other)} entries"]
        return [
            text for n, pair in enumerate(zip(one, other, strict=True)) for text in differences(*pair, f"{where}[{n}]")
        ]
    if isinstance(one, Tensor):
        same = one.shape == other.shape and torch.equal(torch.nan_to_num(one, 7e7), torch.nan_to_num(other, 7e7))
        return [] if same else [f"{where}: differs by {float((one.double() - other.double()).abs().max()):.3g}"]
    if isinstance(one, float) and math.isnan(one) and math.isnan(other):
        return []
    return [] if one == other else [f"{where}: {one!r} against {other!r}"]
