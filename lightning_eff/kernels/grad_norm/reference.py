"""Sum of squares and scaling of a list of tensors in plain torch: what the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_BLOCK = 2**15
"""Elements that the CPU sums into one float32 before the float64 sum over blocks: its norm adds one after the other,
and over 16 million equal elements lost 1 %. On a GPU the reduction is a tree."""


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squared elements of all tensors; see :func:`lightning_eff.kernels.grad_norm.sum_of_squares`."""
    device = tensors[0].device
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for group in _by_dtype(tensors):
        if device.type == "cpu":
            group = [block for tensor in group for block in torch.split(tensor.reshape(-1), CPU_BLOCK)]
        norms = torch.stack(torch._foreach_norm(group, 2, dtype=_accumulator(group[0])))
        total += norms.to(total.dtype).square().sum()
    return total


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: Tensor, zero_nonfinite: bool) -> None:
    """Multiply all tensors in place; see :func:`lightning_eff.kernels.grad_norm.scale_`."""
    for group in _by_dtype(tensors):
        if zero_nonfinite:
            for tensor in group:
                tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        # 16-bit tensors are scaled by a float32 coefficient: rounding it to bfloat16 would miss by up to 0.4 %.
        torch._foreach_mul_(group, coefficient.to(_accumulator(group[0])))


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups that one ``torch._foreach`` call can take."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
