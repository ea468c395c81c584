"""Select the largest rows of many matrices, pack them into one send buffer, and scatter the reduced buffer back.

Byte count with a float32 error memory E, for float32 matrices of which a fifth of the rows is selected: 12 bytes for
each packed element (G and E read, the buffer written) and 15 for each element of the scatter (the buffer's rows read, G
and E read in the others, both written). Separate steps (index, add, divide, concatenate; add, zero the rows, copy to E,
zero G, index back) move 44 and 26, and launch a dozen kernels for each matrix instead of two in all.

Scores and selection need no kernel of their own: they read n x r numbers, and a few launches of torch do all matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.matrices import MatrixList, inspect_errors, inspect_matrices
from lightning_eff.kernels.row_pack import reference
from lightning_eff.kernels.row_pack.layout import pack_layout
from lightning_eff.kernels.tables import DTYPE_CODES

__all__ = ["pack_rows", "row_scores", "scatter_rows_", "select_rows"]


def row_scores(sketch: Tensor) -> Tensor:
    """Score of every row: the squared L2 norm of its sketch, in float32.

    Args:
        sketch: floating (rows, rank), from :func:`lightning_eff.kernels.row_sketch.row_sketch`, reduced over ranks.

    Returns:
        float32 (rows,).

    Raises:
        ValueError: ``sketch`` has not two dimensions.

    Example:
        >>> row_scores(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([25.,  1.])
    """
    if sketch.ndim != 2:
        raise ValueError(f"row_scores: sketch of shape {tuple(sketch.shape)} has not two dimensions")
    return sketch.to(torch.float32).square().sum(dim=1)


def _check_counts(op: str, rows: Sequence[int], counts: Sequence[int]) -> None:
    if len(counts) != len(rows):
        raise ValueError(f"{op}: {len(counts)} counts for {len(rows)} matrices")
    for index, (count, available) in enumerate(zip(counts, rows, strict=True)):
        if not 0 <= count <= available:
            raise ValueError(f"{op}: counts[{index}]={count!r} is not allowed: matrix {index} has {available} rows")


def select_rows(scores: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The rows with the largest scores of each matrix, in a constant number of launches and without a host sync.

    Equal scores are taken in the order of the rows, so that ranks with equal scores select equal rows. NaN counts as
    larger than everything.

    Args:
        scores: floating (total rows,), matrix after matrix.
        rows: n, how many rows each matrix has.
        counts: K, how many to select of each, 0 to n.

    Returns:
        int64 (total counts,): row numbers, counted through all matrices, ascending.

    Raises:
        ValueError: ``scores`` does not fit ``rows``, or a count is out of its range.

    Example:
        >>> select_rows(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]), rows=[3, 2], counts=[2, 1])
        tensor([1, 2, 3])
    """
    _check_counts("select_rows", rows, counts)
    if scores.shape != (sum(rows),):
        raise ValueError(f"select_rows: scores of shape {tuple(scores.shape)} must be of shape ({sum(rows)},)")
    layout = pack_layout([(count, 1) for count in rows], counts, scores.device)
    # By score, then by matrix: the second sort keeps the order of the first within a matrix.
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(layout.row_owners[order], stable=True)]
    return order[layout.positions].sort().values


def _check_lists(
    op: str, matrices: Sequence[Tensor], selected: Tensor, counts: Sequence[int], errors: Sequence[Tensor] | None
) -> tuple[MatrixList, MatrixList | None, str | None]:
    inspected = inspect_matrices(op, matrices)
    kept = None if errors is None else inspect_errors(op, errors, inspected)
    _check_counts(op, [shape[0] for shape in inspected.shapes], counts)
    if selected.shape != (sum(counts),) or selected.dtype != torch.int64 or not selected.is_contiguous():
        raise ValueError(
            f"{op}: selected of shape {tuple(selected.shape)} and {selected.dtype} must be contiguous int64 of shape "
            f"({sum(counts)},)"
        )
    device = inspected.listed.device
    if device is not None and selected.device != device:
        raise ValueError(f"{op}: tensors on different devices: 0 on {device}, selected on {selected.device}")
    return inspected, kept, inspected.listed.obstacle or (kept.listed.obstacle if kept is not None else None)


def pack_rows(
    matrices: Sequence[Tensor],
    selected: Tensor,
    counts: Sequence[int],
    divisor: float,
    errors: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather the selected rows of G + E, divided by a number, into one contiguous buffer.

    Sum and quotient are taken in float32, before the rounding to the buffer's dtype: dividing first keeps a float16
    sum over the ranks from overflowing.

    Args:
        matrices: float32, bfloat16 or float16 matrices on one device. Float64 and non-contiguous ones take the
            reference.
        selected: int64 (total counts,) from :func:`select_rows`. Every matrix's own: a row number out of its matrix
            gives a row of NaN in the kernel and an ``IndexError`` in the reference.
        counts: how many rows of each matrix.
        divisor: the world size.
        errors: a float32 matrix of the same shape for each, added first; None for none.
        dtype: of the buffer; None for that of the matrices, or float32 if they differ.

    Returns:
        (sum of counts[j] * columns[j],): row after row, matrix after matrix.

    Raises:
        TypeError: something in a list is no dense floating tensor.
        ValueError: an argument out of its range, different devices, or tensors that do not fit each other.

    Example:
        >>> G = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> pack_rows([G], torch.tensor([0, 2]), counts=[2], divisor=2)
        tensor([0.5000, 1.0000, 2.5000, 3.0000])
    """
    op = "pack_rows"
    inspected, kept, obstacle = _check_lists(op, matrices, selected, counts, errors)
    if not divisor > 0:
        raise ValueError(f"{op}: divisor={divisor!r} is not allowed: it must be positive")
    dtypes = {matrix.dtype for matrix in matrices}
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype={dtype} is not allowed: it must be floating")
    if dtype not in DTYPE_CODES:
        obstacle = f"the buffer is {dtype}"
    if inspected.listed.device is None:
        return torch.zeros(0, dtype=dtype)
    if choose("row_pack", inspected.listed.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.row_pack import kernel

        return kernel.pack_rows(inspected, selected, counts, divisor, kept, dtype)
    return reference.pack_rows(matrices, selected, counts, divisor, errors, dtype)


def scatter_rows_(
    matrices: Sequence[Tensor],
    buffer: Tensor,
    selected: Tensor,
    counts: Sequence[int],
    errors: Sequence[Tensor] | None = None,
    update: Tensor | None = None,
) -> None:
    """Write the reduced rows into the gradients, zeros into all others, and what was not sent into the errors.

    In one pass: E becomes G + E in the rows that were not selected and 0 in those that were, then G is overwritten.
    What the buffer's dtype rounded off the sent rows is not remembered.

    Args:
        matrices: as for :func:`pack_rows`; changed in place.
        buffer: as :func:`pack_rows` returned it, after the all-reduce.
        selected: as for :func:`pack_rows`.
        counts: as for :func:`pack_rows`.
        errors: the error memories, changed in place; None for none.
        update: 0-d tensor on the same device; where it is 0 (or False) the errors stay as they are, so that a
            non-finite step does not enter them. None always updates.

    Raises:
        TypeError: something in a list is no dense floating tensor.
        ValueError: an argument out of its range, different devices, or tensors that do not fit each other.

    Example:
        >>> G, E = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
        >>> scatter_rows_([G], torch.tensor([9.0, 8.0]), torch.tensor([1]), counts=[1], errors=[E])
        >>> G, E
        (tensor([[0., 0.],
                [9., 8.]]), tensor([[1.5000, 2.5000],
                [0.0000, 0.0000]]))
    """
    op = "scatter_rows_"
    inspected, kept, obstacle = _check_lists(op, matrices, selected, counts, errors)
    device = inspected.listed.device
    size = sum(count * columns for count, (_, columns) in zip(counts, inspected.shapes, strict=True))
    if buffer.shape != (size,) or not buffer.dtype.is_floating_point:
        raise ValueError(
            f"{op}: buffer of shape {tuple(buffer.shape)} and {buffer.dtype} must be floating of shape ({size},)"
        )
    if device is None:
        return
    for name, tensor in (("buffer", buffer), ("update", update)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: tensors on different devices: 0 on {device}, {name} on {tensor.device}")
    if update is not None and update.numel() != 1:
        raise ValueError(f"{op}: update of shape {tuple(update.shape)} is not one number")
    if not buffer.is_contiguous() or buffer.dtype not in DTYPE_CODES:
        obstacle = f"the buffer is {buffer.dtype} with strides {buffer.stride()}"
    if choose("row_pack", device, obstacle).implementation == "triton":
        from lightning_eff.kernels.row_pack import kernel

        kernel.scatter_rows_(inspected, buffer, selected, counts, kept, update)
    else:
        reference.scatter_rows_(matrices, buffer, selected, counts, errors, update)
