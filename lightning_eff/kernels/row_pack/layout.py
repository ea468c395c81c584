"""Where the selected rows of a list of matrices lie in the send buffer: fixed by the shapes and the counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.kernels.tables import CACHE_SIZE, stream_of, to_device


@dataclass(frozen=True)
class PackLayout:
    """Index tensors on one device; rows are numbered through all matrices, slots through all selected rows.

    Attributes:
        row_owners: int32 (rows,), the matrix of each row.
        slot_owners: int32 (slots,), the matrix of each slot.
        local_slots: int32 (slots,), a slot's number within its matrix.
        first_rows: int64 (matrices,), the number of each matrix's first row.
        buffer_offsets: int64 (matrices,), where each matrix's part of the buffer begins, in elements.
        positions: int64 (slots,), the first counts[j] rows of each matrix j.
        buffer_numel: elements of the buffer.
    """

    row_owners: Tensor
    slot_owners: Tensor
    local_slots: Tensor
    first_rows: Tensor
    buffer_offsets: Tensor
    positions: Tensor
    buffer_numel: int


def pack_layout(shapes: Sequence[tuple[int, int]], counts: Sequence[int], device: torch.device) -> PackLayout:
    """The layout for matrices of these shapes, of which ``counts`` rows each are selected."""
    return _layout(device, stream_of(device), tuple(shapes), tuple(counts))


@functools.lru_cache(CACHE_SIZE)
def _layout(
    device: torch.device, stream: int, shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...]
) -> PackLayout:
    rows = torch.tensor([shape[0] for shape in shapes], dtype=torch.int64)
    columns = torch.tensor([shape[1] for shape in shapes], dtype=torch.int64)
    total = sum(shape[0] for shape in shapes)
    selected = torch.tensor(counts, dtype=torch.int64)
    matrices = torch.arange(len(rows))
    slot_owners = torch.repeat_interleave(matrices, selected, output_size=sum(counts))
    local_slots = torch.arange(len(slot_owners)) - (torch.cumsum(selected, 0) - selected)[slot_owners]
    first_rows = torch.cumsum(rows, 0) - rows
    sizes = selected * columns
    return PackLayout(
        row_owners=to_device(torch.repeat_interleave(matrices, rows, output_size=total), torch.int32, device),
        slot_owners=to_device(slot_owners, torch.int32, device),
        local_slots=to_device(local_slots, torch.int32, device),
        first_rows=to_device(first_rows, torch.int64, device),
        buffer_offsets=to_device(torch.cumsum(sizes, 0) - sizes, torch.int64, device),
        positions=to_device(first_rows[slot_owners] + local_slots, torch.int64, device),
        buffer_numel=sum(count * shape[1] for count, shape in zip(counts, shapes, strict=True)),
    )
