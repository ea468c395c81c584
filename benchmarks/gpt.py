"""What the benchmarks' runs of the example GPT have in common."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn

from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from examples.gpt.module import GPTModule
from harness.runs import quiet_trainer
from harness.timing import StepTimes

GPT_1M = GPTConfig(block_size=128)
GPT_10M = GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384)


def parameters(module: nn.Module) -> int:
    """How many numbers are trained or frozen in it."""
    return sum(parameter.numel() for parameter in module.parameters())


def constant(config: GPTConfig, fused: bool = True, **arguments: Any) -> GPTModule:
    """A GPT at a constant rate from the first step on."""
    return GPTModule(config, **{"schedule": "constant", "warmup_steps": 0, "fused": fused, **arguments})


def text(config: GPTConfig, batch_size: int, **arguments: Any) -> TextDataModule:
    """The standard library's sources, in sequences of the GPT's length."""
    return TextDataModule(block_size=config.block_size, batch_size=batch_size, **arguments)


def train(
    module: L.LightningModule, data: Any, *callbacks: L.Callback, ckpt_path: str | None = None, **arguments: Any
) -> L.Trainer:
    """Train on one device, a GPU where there is one, and validate only where the arguments say so."""
    alone = {"devices": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(*callbacks, **{**alone, **arguments})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def step_times(module: L.LightningModule, data: Any, steps: int, *callbacks: L.Callback, warmup: int = 1) -> StepTimes:
    """Of so many steps with some callbacks, after a warm-up."""
    times = StepTimes(warmup)
    train(module, data, times, *callbacks, max_steps=warmup + steps)
    return times


def validation_loss(module: L.LightningModule, data: Any) -> float:
    """Nats a byte."""
    return quiet_trainer(devices=1).validate(module, data, verbose=False)[0]["val_loss"]


@torch.no_grad()
def mean_loss(model: GPT, data: TextDataModule) -> float:
    """Nats a byte over the validation windows, without a Trainer."""
    batches = list(data.val_dataloader())
    losses = torch.stack([model.loss(batch) * len(batch) for batch in batches])
    return (losses.sum() / sum(len(batch) for batch in batches)).item()
