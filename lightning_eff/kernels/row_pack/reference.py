"""Packing and scattering of selected rows in plain torch: what the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _pieces(matrices: Sequence[Tensor], selected: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Each matrix's selected rows, numbered within it."""
    firsts = torch.tensor([0, *(matrix.shape[0] for matrix in matrices)]).cumsum(0).tolist()
    return [rows - first for rows, first in zip(torch.split(selected, list(counts)), firsts, strict=False)]


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
    parts = []
    for index, rows in enumerate(_pieces(matrices, selected, counts)):
        values = matrices[index][rows].to(torch.float32)
        if errors is not None:
            values = values + errors[index][rows].to(torch.float32)
        parts.append((values / divisor).to(dtype).flatten())
    return torch.cat(parts)


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
    sizes = [count * matrix.shape[1] for count, matrix in zip(counts, matrices, strict=True)]
    parts = torch.split(buffer, sizes)
    for index, rows in enumerate(_pieces(matrices, selected, counts)):
        matrix = matrices[index]
        if errors is not None:
            kept = errors[index] + matrix.to(torch.float32)
            kept[rows] = 0
            errors[index].copy_(kept if update is None else torch.where(update != 0, kept, errors[index]))
        matrix.zero_()
        matrix[rows] = parts[index].view(len(rows), matrix.shape[1]).to(matrix.dtype)
