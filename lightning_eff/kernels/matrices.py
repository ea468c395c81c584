"""Lists of matrices as one table that a single launch can read: addresses, shapes and dtypes, cut into row blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_eff.kernels.tables import CACHE_SIZE, TensorList, inspect, stream_of, to_device

MAX_COLUMNS = 2**25  # the offsets within a block of rows are 32-bit numbers


@dataclass(frozen=True)
class MatrixTable:
    """A list of contiguous matrices on the device, cut into blocks of rows.

    Attributes:
        rows: int32 (matrices,).
        columns: int32 (matrices,).
        codes: int32 (matrices,), the dtypes.
        first_rows: int64 (matrices,), where a matrix's rows begin when all rows are numbered through.
        owners: int32 (blocks,), the matrix that a block belongs to.
        positions: int32 (blocks,), a block's number within its matrix.
        blocks: how many there are.
        total_rows: rows of all matrices.
    """

    rows: Tensor
    columns: Tensor
    codes: Tensor
    first_rows: Tensor
    owners: Tensor
    positions: Tensor
    blocks: int
    total_rows: int


@dataclass(frozen=True)
class MatrixList:
    """A list of matrices as a call needs it; ``listed`` is what :func:`inspect` has read."""

    listed: TensorList
    shapes: tuple[tuple[int, int], ...]


def inspect_matrices(op: str, matrices: Sequence[Tensor]) -> MatrixList:
    """Read a list of matrices on one device; see :func:`inspect`.

    Raises:
        ValueError: a tensor has not two dimensions.
    """
    listed = inspect(op, matrices)
    for index, matrix in enumerate(matrices):
        if matrix.ndim != 2:
            raise ValueError(f"{op}: tensor {index} of shape {tuple(matrix.shape)} is no matrix: reshape it")
    shapes = tuple((matrix.shape[0], matrix.shape[1]) for matrix in matrices)
    if listed.obstacle is None and any(columns >= MAX_COLUMNS for _, columns in shapes):
        listed = replace(listed, obstacle=f"more than {MAX_COLUMNS} columns")
    return MatrixList(listed, shapes)


def inspect_errors(op: str, errors: Sequence[Tensor], matrices: MatrixList) -> MatrixList:
    """Read the error memories of matrices: float32, and as large as these.

    Raises:
        ValueError: there are not as many, or one has another shape, dtype or device.
    """
    kept = inspect_matrices(f"{op}, errors", errors)
    if len(kept.shapes) != len(matrices.shapes):
        raise ValueError(f"{op}: {len(kept.shapes)} errors for {len(matrices.shapes)} matrices")
    for index, error in enumerate(errors):
        if kept.shapes[index] != matrices.shapes[index] or error.dtype != torch.float32:
            raise ValueError(
                f"{op}: error {index} of shape {kept.shapes[index]} and {error.dtype} must be float32 of shape "
                f"{matrices.shapes[index]}"
            )
    if kept.listed.device != matrices.listed.device:
        raise ValueError(
            f"{op}: tensors on different devices: 0 on {matrices.listed.device}, error 0 on {kept.listed.device}"
        )
    return kept


def matrix_table(matrices: MatrixList, block_rows: int = 32) -> MatrixTable:
    """The table of a non-empty list: everything but the addresses; a program of a kernel takes ``block_rows`` rows."""
    device = matrices.listed.device
    assert device is not None
    return _table(device, stream_of(device), matrices.shapes, matrices.listed.codes, block_rows)


@functools.lru_cache(CACHE_SIZE)
def _table(
    device: torch.device, stream: int, shapes: tuple[tuple[int, int], ...], codes: tuple[int, ...], block_rows: int
) -> MatrixTable:
    rows = torch.tensor([shape[0] for shape in shapes])
    columns = torch.tensor([shape[1] for shape in shapes])
    counts = (rows + block_rows - 1) // block_rows
    firsts = torch.cumsum(counts, 0) - counts
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return MatrixTable(
        rows=to_device(rows, torch.int32, device),
        columns=to_device(columns, torch.int32, device),
        codes=to_device(codes, torch.int32, device),
        first_rows=to_device(torch.cumsum(rows, 0) - rows, torch.int64, device),
        owners=to_device(owners, torch.int32, device),
        positions=to_device(torch.arange(len(owners)) - firsts[owners], torch.int32, device),
        blocks=len(owners),
        total_rows=int(rows.sum()),
    )
