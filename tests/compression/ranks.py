"""Gradients of several ranks for the tests of the compressors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.compression import ArcTopK

SHAPES = {"0.weight": (24, 16), "0.bias": (24,), "1.weight": (8, 3, 2, 2), "2.weight": (10, 24)}


class Always(ArcTopK):
    """Compresses also where it does not pay."""

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        return 0.0


def gradients(step: int, world_size: int, shapes: dict[str, tuple[int, ...]] | None = None) -> list[dict[str, Tensor]]:
    """For each rank; a common part and one of its own."""
    generator = torch.Generator().manual_seed(step)
    shapes = shapes or SHAPES
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [
        {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in common.items()}
        for _ in range(world_size)
    ]


def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over the ranks, in float64."""
    return {name: torch.stack([part[name].double() for part in parts]).mean(0) for name in parts[0]}


def memory_of(entries: list[dict[str, dict[str, Tensor]]]) -> list[Tensor]:
    """Every tensor of all memories, copied."""
    return [tensor.clone() for memory in entries for name in sorted(memory) for tensor in memory[name].values()]
