"""What the loops train: a small network on noisy data, so that each of them runs in a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 8


def network() -> nn.Module:
    """Three matrices."""
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def batch(step: int, rank: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """That of a step, the same whenever it is asked for: a loop that resumes needs no sampler's state."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(size, WIDTH, generator=generator)
    noise = torch.randn(size, 1, generator=generator)
    return x, x[:, :4].sin().sum(1, keepdim=True) + 0.3 * noise


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(model(x), y)


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    """On batches that no step has seen."""
    return sum(loss_of(model, *batch(step, rank=99)).item() for step in range(16)) / 16
