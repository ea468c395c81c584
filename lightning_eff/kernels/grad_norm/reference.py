"""Sum of squares and scaling of a list of tensors in plain torch: what the kernels are held to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from lightning_eff.kernels import tables

CPU_BLOCK = 2**15
"""Elements that the CPU sums into one float32 before the float64 sum over blocks: its norm adds one after the other,
and over 16 million equal elements lost 1 %. On a GPU the reduction is a tree."""

SMALL = 2**12
"""Tensors of up to so many elements are copied into one: that costs less than an operator call for each of them."""


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squared elements of all tensors; see :func:`lightning_eff.kernels.grad_norm.sum_of_squares`."""
    device = tensors[0].device
    total = torch.float32 if device.type == "mps" else torch.float64
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, ([], []))[tensor.numel() <= SMALL].append(tensor)
    sums = []
    for pieces, small in groups.values():
        if small:
            pieces.append(_flatten_dense_tensors(small))  # type: ignore[no-untyped-call]
        if device.type == "cpu":
            pieces = [block for piece in pieces for block in _blocks(piece)]
        norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=_accumulator(pieces[0])))
        sums.append(norms.to(total).square().sum())
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: Tensor, zero_nonfinite: bool) -> None:
    """Multiply all tensors in place; see :func:`lightning_eff.kernels.grad_norm.scale_`."""
    value = tables.value_at_hand(coefficient.float())
    if value == 1:  # as mostly
        return
    if value == 0 and zero_nonfinite:
        torch._foreach_zero_(list(tensors))
        return
    zero_nonfinite = zero_nonfinite and value is None  # another coefficient says that all are finite
    alike: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype, tensor.shape].append(tensor)
    for (_, shape), small in alike.items():
        if shape.numel() > SMALL:
            for tensor in small:
                _scale(tensor, coefficient, zero_nonfinite)
            continue
        stacked = torch.stack(small)
        _scale(stacked, coefficient, zero_nonfinite)
        torch._foreach_copy_(small, stacked.unbind())


def _scale(tensor: Tensor, coefficient: Tensor, zero_nonfinite: bool) -> None:
    if zero_nonfinite:
        tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    factor = coefficient.to(_accumulator(tensor))
    if tensor.dtype == factor.dtype:
        tensor.mul_(factor)
    else:
        # On a GPU a product of 16 bits with a 0-d tensor rounds that to 16 bits first, and misses by up to 0.4 %.
        tensor.copy_(tensor.to(factor.dtype).mul_(factor))


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.reshape(-1), CPU_BLOCK) if tensor.numel() > CPU_BLOCK else [tensor]


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
