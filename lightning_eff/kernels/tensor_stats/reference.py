"""Statistics of each tensor of a list in plain torch: what the kernel is held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_eff.kernels import tables

BLOCK = 2**16
"""Elements that a CPU takes at a time of a larger tensor: they fit into its cache."""

SMALL = 2**12
"""Tensors of one size of up to so many elements become the rows of one: that costs less than calls for each of them."""


@torch.no_grad()
def tensor_stats(
    tensors: Sequence[Tensor], copies: Sequence[Tensor] | None, update: Tensor | None, extremes: bool = False
) -> Tensor:
    """L1 norm, squared L2 norm and L1 norm of the change, as rows of a (3, len(tensors)) tensor.

    With ``extremes`` of a (6, len(tensors)) tensor: also the largest absolute element that is a number, how many are
    zero, and how many are not finite.
    """
    device = tensors[0].device
    total = torch.float32 if device.type == "mps" else torch.float64
    columns: list[Tensor] = []
    order: list[int] = []
    for members in _alike(tensors):
        group = [tensors[index] for index in members]
        order += members
        if copies is None and len(group) == 1 and device.type == "cpu" and group[0].numel() > SMALL:
            columns.append(_in_blocks(group[0], extremes)[:, None])
            continue
        rows = _rows(group)
        values = rows.to(torch.promote_types(rows.dtype, torch.float32))
        change = torch.zeros(len(group), dtype=values.dtype, device=device)
        if copies is not None:
            kept = [copies[index] for index in members]
            old = _rows(kept)
            change = (values - old).abs().sum(1)
            if update is None:
                torch._foreach_copy_(kept, group)
            else:
                chosen = torch.where(update != 0, rows, old).view(-1)
                torch._foreach_copy_(kept, _unflatten_dense_tensors(chosen, kept))  # type: ignore[no-untyped-call]
        sizes = values.abs()
        found = [sizes.sum(1), values.square().sum(1), change]
        if extremes:
            numbers = torch.where(sizes.isnan(), 0.0, sizes)
            found.append(numbers.amax(1) if rows.shape[1] else change)
            found += [(values == 0).sum(1), (~sizes.isfinite()).sum(1)]
        columns.append(torch.stack([number.to(total) for number in found]))
    table = torch.cat(columns, dim=1)
    if order == list(range(len(order))):
        return table
    places = torch.tensor(order).argsort().to(device, non_blocking=True)
    return table.index_select(1, places)


def _in_blocks(tensor: Tensor, extremes: bool) -> Tensor:
    """The column of a large tensor. What is made of a block stays in the cache, and none has a tensor of booleans."""
    blocks = []
    for block in torch.split(tensor.reshape(-1), BLOCK):
        values = block.to(torch.promote_types(block.dtype, torch.float32))
        sizes = values.abs()
        found = [sizes.sum(), values.dot(values), values.new_zeros(())]
        if extremes:
            truth = torch.empty_like(values)  # 0 or 1, whose sum has vector instructions
            zeros = torch.eq(values, 0, out=truth).sum()
            nonfinite = torch.ne(values - values, 0, out=truth).sum()
            numbers = sizes if tables.value_at_hand(nonfinite) == 0 else torch.where(sizes.isnan(), 0.0, sizes)
            found += [numbers.amax(), zeros, nonfinite]
        blocks.append(torch.stack(found))
    table = torch.stack(blocks).to(torch.float64)
    sums = table.sum(0)
    if extremes:
        sums[3] = table[:, 3].amax()
    return sums


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places in the list of those that are taken together."""
    groups: dict[tuple[torch.dtype, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        size = tensor.numel()
        if size > SMALL:
            yield [index]
        else:
            groups.setdefault((tensor.dtype, size), []).append(index)
    yield from groups.values()


def _rows(tensors: list[Tensor]) -> Tensor:
    """Tensors of one size, each a row."""
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat.view(len(tensors), tensors[0].numel())
