"""Statistics of each tensor of a list in plain torch: what the kernel is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def tensor_stats(tensors: Sequence[Tensor], copies: Sequence[Tensor] | None, update: Tensor | None) -> Tensor:
    """L1 norm, squared L2 norm and L1 norm of the change, as rows of a (3, len(tensors)) tensor."""
    device = tensors[0].device
    total = torch.float32 if device.type == "mps" else torch.float64
    rows = []
    for index, tensor in enumerate(tensors):
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        values = tensor.to(dtype)
        change = torch.zeros((), dtype=dtype, device=device)
        if copies is not None:
            change = (values - copies[index].to(dtype)).abs().sum()
            copies[index].copy_(tensor if update is None else torch.where(update != 0, tensor, copies[index]))
        rows.append(torch.stack([values.abs().sum(), values.square().sum(), change]).to(total))
    return torch.stack(rows, dim=1)
