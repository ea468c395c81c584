"""Sum of squares and scaling of a list of tensors in plain torch: what the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squared elements of all tensors; see :func:`lightning_eff.kernels.grad_norm.sum_of_squares`."""
    device = tensors[0].device
    total = torch.float32 if device.type == "mps" else torch.float64
    # Not torch.linalg.vector_norm: on the CPU its float32 sum loses a per cent over 16 million elements.
    squares = [
        tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).square().sum().to(total)
        for tensor in tensors
    ]
    return torch.stack(squares).sum()


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiply in place, 0 giving zeros; see :func:`lightning_eff.kernels.grad_norm.scale_`."""
    for tensor in tensors:
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        factor = coefficient.to(dtype)
        tensor.copy_(torch.where(factor == 0, 0, tensor.to(dtype) * factor))
