"""Tensors that lie in poisoned memory, at a chosen alignment."""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 64


class Poisoned:
    """A copy of a tensor between two margins of NaN.

    Args:
        tensor: the values.
        shift: elements by which the copy is moved from a 16-byte boundary.
    """

    def __init__(self, tensor: Tensor, shift: int = 0) -> None:
        self.memory = torch.full((tensor.numel() + 2 * MARGIN + shift,), float("nan"), dtype=tensor.dtype)
        self.memory = self.memory.to(tensor.device)
        self.start = MARGIN + shift
        self.tensor = self.memory[self.start : self.start + tensor.numel()].view(tensor.shape)
        self.tensor.copy_(tensor)
        assert tensor.numel() == 0 or (self.tensor.data_ptr() % 16 == 0) == (shift * tensor.element_size() % 16 == 0)

    def check(self) -> None:
        """Fail where something wrote beside the tensor."""
        assert self.memory[: self.start].isnan().all()
        assert self.memory[self.start + self.tensor.numel() :].isnan().all()


def random_like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)
