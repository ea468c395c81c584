"""Training runs for benchmarks/detectors.py: three nets, healthy and with three faults that end in a divergence.

Recorded is what the rules of TrainingGuard look at, step by step, so that a rule can be asked again without training.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpt import train
from benchmarks.spectral_runs import RateRamp, exploded
from benchmarks.spectral_runs import gpt as old_gpt
from examples.digits.data import DigitsDataModule
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from harness.runs import begin
from harness.timing import now
from lightning_eff.callbacks import AlarmRule

FAULT = 150  # the step from which on something is wrong
STEPS = 400
GROWTH = 1.025  # of the rate, a step
RECORDS = Path("logs/detectors")


# --- nets ------------------------------------------------------------------------------------------------------------


class Trained(L.LightningModule):
    """AdamW with a warm-up of 50 steps; the share of the rate that follows is a function of the step."""

    def __init__(self, net: nn.Module, lr: float = 1e-3, schedule: str = "constant") -> None:
        super().__init__()
        self.net, self.lr, self.schedule = net, lr, schedule

    def factor(self, step: int) -> float:
        """Of the rate: warm-up, then constant, one cosine, or a cosine that is warmed again at half time."""
        if step < 50:
            return (step + 1) / 50
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - 50) / (STEPS - 50)))
        half = STEPS // 2
        if step < half:
            return 0.55 + 0.45 * math.cos(math.pi * (step - 50) / (half - 50))
        return min(1.0, 0.1 + 0.9 * (step - half) / 40)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Bytes(Trained):
    """Predicts the next byte, of batches (batch, length + 1)."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.long()
        targets = spoilt(self, batch[:, 1:], 256)
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), targets.flatten())


class Digits(Trained):
    """Ten classes of small images."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), spoilt(self, labels, 10))


def spoilt(module: L.LightningModule, labels: Tensor, classes: int) -> Tensor:
    """The labels, of which a growing share is drawn at random where ``module.labels_go_bad``."""
    if not getattr(module, "labels_go_bad", False):
        return labels
    share = min(1.0, max(0, module.global_step - FAULT) / 500)
    generator = torch.Generator().manual_seed(module.global_step)
    bad = torch.rand(labels.shape, generator=generator) < share
    return torch.where(bad, torch.randint(0, classes, labels.shape, generator=generator), labels)


class LSTM(nn.Module):
    """One layer over bytes."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(256, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(tokens))[0])


class ViT(nn.Module):
    """Sixteen patches of 2 x 2 pixels, three blocks of width 48; queries and keys are layers of their own."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(ViTBlock(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_attn(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def _texts(seed: int, pattern: str = "cp*.py") -> TextDataModule:
    """The code tables of the standard library in 8 x 32 bytes a step."""
    return TextDataModule(
        root=Path(sysconfig.get_path("stdlib")) / "encodings", pattern=pattern, val_fraction=0.2, block_size=32,
        batch_size=8, val_windows=8, seed=seed,
    )  # fmt: skip


def _gpt(seed: int, **arguments: Any) -> tuple[L.LightningModule, Any]:
    return Bytes(GPT(GPTConfig(32, 3, 4, 64)), **arguments), _texts(seed)


def _lstm(seed: int, **arguments: Any) -> tuple[L.LightningModule, Any]:
    return Bytes(LSTM(), **{"lr": 3e-3, **arguments}), _texts(seed)


def _vit(seed: int, **arguments: Any) -> tuple[L.LightningModule, Any]:
    return Digits(ViT(), **arguments), DigitsDataModule(batch_size=32, seed=seed)


NETS = {"GPT": _gpt, "ViT": _vit, "LSTM": _lstm}
PARTS = {"GPT": ("query", "key"), "ViT": ("query", "key"), "LSTM": ("recurrent",)}


# --- what changes in the middle of a healthy run ---------------------------------------------------------------------


class OtherData(L.Callback):
    """From half time on batches are others: shifted bytes, or images upside down and inverted. It says so."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < STEPS // 2:
            return
        if isinstance(batch, Tensor):
            batch.copy_((batch.long() * 7 + 13) % 256)  # another alphabet
        else:
            batch[0].copy_(1 - batch[0].flip(-2))


# --- recording -------------------------------------------------------------------------------------------------------


class Signals(L.Callback):
    """The loss, the rate and what each rule looks at, after each step."""

    def __init__(self, rules: list[AlarmRule], stop_when_exploded: bool) -> None:
        self.rules, self.stop = rules, stop_when_exploded
        self.values: dict[str, list[float]] = {name: [] for name in ("loss", "rate", *(rule.name for rule in rules))}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for rule in self.rules:
            rule.setup(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for rule in self.rules:
            rule.before_batch(trainer, pl_module)

    def on_before_backward(self, *_: Any) -> None:
        for rule in self.rules:
            rule.after_forward()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.values["loss"].append(outputs["loss"].item())
        self.values["rate"].append(max(group["lr"] for group in trainer.optimizers[0].param_groups))
        for rule in self.rules:
            value = rule.value(trainer, pl_module, outputs["loss"])
            self.values[rule.name].append(math.nan if value is None else float(value))
        if self.stop and exploded(self.values["loss"]) is not None:
            trainer.should_stop = True


# --- the runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A kind of run: what is trained, and what goes wrong with it from which step on."""

    name: str
    build: Any
    diverges: bool = False
    fault_at: int = 0
    faults: Any = list
    data_changes: bool = False


def _bad_labels(build: Any, seed: int) -> Any:
    module, data = build(seed)
    module.labels_go_bad = True
    return module, data


def _workloads() -> Iterator[Workload]:
    for net, build in NETS.items():
        faulty = partial(Workload, diverges=True, fault_at=FAULT)
        yield faulty(f"{net}: rate grows", build, faults=lambda: [RateRamp(FAULT, GROWTH)])
        part = PARTS[net]
        yield faulty(f"{net}: rate of a part grows", build, faults=lambda part=part: [RateRamp(FAULT, GROWTH, part)])
        yield faulty(f"{net}: labels go bad", partial(_bad_labels, build))
        yield Workload(f"{net}: healthy", build)
        yield Workload(f"{net}: healthy, high rate", partial(build, lr=1e-2 if net == "LSTM" else 3e-3))
        yield Workload(f"{net}: healthy, cosine", partial(build, schedule="cosine"))
        yield Workload(f"{net}: healthy, warmed again", partial(build, schedule="again"))
        yield Workload(f"{net}: healthy, other data", build, faults=lambda: [OtherData()], data_changes=True)


def _old() -> Iterator[Workload]:
    """Those of benchmarks/spectral_runs.py, whose eleven divergences were looked at before."""
    ramp = partial(Workload, diverges=True, fault_at=FAULT)
    yield ramp("old: rate ramp", old_gpt, faults=lambda: [RateRamp(FAULT, 1.02)])
    no_norm = partial(old_gpt, norm=False)
    yield ramp("old: rate ramp, no LayerNorm", no_norm, faults=lambda: [RateRamp(FAULT, 1.015)])
    yield Workload("old: low-precision attention", partial(old_gpt, lr=6e-3, bits=2), diverges=True)
    yield ramp("old: query-key growth", old_gpt, faults=lambda: [RateRamp(FAULT, 1.02, ("query", "key"))])
    yield Workload("old: healthy GPT, rate 3e-3", partial(old_gpt, lr=3e-3))
    yield Workload("old: healthy GPT without LayerNorm", no_norm)


WORKLOADS = {workload.name: workload for workload in (*_workloads(), *_old())}


def record(workload: Workload, seed: int, rules: list[AlarmRule], folder: Path = RECORDS) -> dict[str, Any]:
    """Train once on one thread; the signals go to ``folder``."""
    begin(seed)
    module, data = workload.build(seed)
    signals, started = Signals(rules, workload.diverges), now()
    steps = 100 + STEPS if workload.diverges else STEPS  # one that diverges ends there
    train(module, data, *workload.faults(), signals, accelerator="cpu", max_steps=steps)
    run = {
        "workload": workload.name,
        "seed": seed,
        "signals": {name: torch.tensor(values, dtype=torch.float64) for name, values in signals.values.items()},
        "seconds": now() - started,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(run, folder / f"{workload.name}-{seed}.pt")
    return run
