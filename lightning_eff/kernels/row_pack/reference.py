"""Packing and scattering of selected rows in plain torch: what the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def _pieces(matrices: Sequence[Tensor], selected: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Each matrix's selected rows, numbered within it."""
    firsts = accumulate((matrix.shape[0] for matrix in matrices), initial=0)
    return [rows - first for rows, first in zip(torch.split(selected, list(counts)), firsts, strict=False)]


def _parts(buffer: Tensor, matrices: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Each matrix's part of the buffer, as rows."""
    columns = [matrix.shape[1] for matrix in matrices]
    parts = torch.split(buffer, [count * m for count, m in zip(counts, columns, strict=True)])
    return [part.view(count, m) for part, count, m in zip(parts, counts, columns, strict=True)]


@torch.no_grad()
def pack_rows(
    matrices: Sequence[Tensor],
    selected: Tensor,
    counts: Sequence[int],
    divisor: float,
    errors: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The rows of G + E, divided, as one flat buffer."""
    size = sum(count * matrix.shape[1] for count, matrix in zip(counts, matrices, strict=True))
    buffer = torch.empty(size, dtype=torch.float32, device=selected.device)
    parts = _parts(buffer, matrices, counts)
    for index, rows in enumerate(_pieces(matrices, selected, counts)):
        matrix = matrices[index]
        if matrix.dtype == torch.float32:
            torch.index_select(matrix, 0, rows, out=parts[index])
        else:
            parts[index].copy_(matrix.index_select(0, rows))
        if errors is not None:
            parts[index].add_(errors[index].index_select(0, rows))
    # By the reciprocal, as the kernel does, and as a GPU does where torch divides by a Python number.
    return buffer.mul_(1 / divisor).to(dtype)


@torch.no_grad()
def scatter_rows_(
    matrices: Sequence[Tensor],
    buffer: Tensor,
    selected: Tensor,
    counts: Sequence[int],
    errors: Sequence[Tensor] | None,
    update: Tensor | None,
) -> None:
    """Spread the buffer over the gradients; what was not sent goes into the errors."""
    # On the CPU the answer is at hand, and a pass over the errors is saved.
    if update is not None and update.device.type == "cpu":
        errors, update = (errors if update else None), None
    parts = _parts(buffer.contiguous(), matrices, counts)
    for index, rows in enumerate(_pieces(matrices, selected, counts)):
        matrix = matrices[index]
        if errors is not None and update is None:
            errors[index].add_(matrix).index_fill_(0, rows, 0)
        elif errors is not None and update is not None:
            kept = (errors[index] + matrix).index_fill_(0, rows, 0)
            errors[index].copy_(torch.where(update != 0, kept, errors[index]))
        matrix.zero_().index_copy_(0, rows, parts[index].to(matrix.dtype))
