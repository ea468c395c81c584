"""Compressed all-reduce in a Fabric loop: a communication hook for DDP, on two processes of this machine.

python -m examples.fabric.compression
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples.fabric.task import batch, loss_of
from lightning_eff.compression import ArcTopK, CompressedReduction, Compressor


class CompressedDDP(DDPStrategy):
    """Fabric's DDP, with a hook that reduces the gradients by a compressor."""

    def __init__(self, compressor: Compressor, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.compressor = compressor
        self.steps = 0
        """Optimizer steps so far; the loop counts them, alike on all ranks."""
        self.reduction: CompressedReduction | None = None

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        ddp = super().setup_module(module)
        self.reduction = CompressedReduction(self.compressor, dict(module.named_parameters()), lambda: self.steps)
        self.reduction.register(ddp)
        return ddp


def train(fabric: L.Fabric, steps: int = 40) -> dict[str, Any]:
    """Train on each rank's own batches."""
    strategy = fabric.strategy
    assert isinstance(strategy, CompressedDDP)
    fabric.seed_everything(0, verbose=False)
    module = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=3e-3))
    losses = []
    for step in range(steps):
        loss = loss_of(model, *batch(step, fabric.global_rank))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        strategy.steps += 1
        losses.append(loss.detach())
    reduction = strategy.reduction
    assert reduction is not None
    # What was left out is kept here, and is this rank's own: save it beside a checkpoint, reduction.memory.
    traffic = reduction.traffic
    return {"module": module, "losses": torch.stack(losses), "traffic": traffic, "memory": reduction.memory}


if __name__ == "__main__":
    strategy = CompressedDDP(ArcTopK(error_feedback="ef14"), process_group_backend="gloo")
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    found = train(fabric)
    sent, dense = found["traffic"].bytes_sent / 1e6, found["traffic"].dense_bytes / 1e6
    fabric.print(f"sent {sent:.2f} MB of {dense:.2f}; loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}")
