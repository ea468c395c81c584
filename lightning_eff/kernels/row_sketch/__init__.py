"""Row sketches P = (G + E) V of many matrices, with a random V of signs that is never stored.

Byte count for a matrix of N bytes with a float32 error memory of 4nm bytes: N + 4nm read, 4nr written. The separate
steps (add, draw V, matrix product) read N + 4nm, write and read the sum (8nm), and write and read V (8mr) for every
matrix, with three launches for each. Without an error memory a matrix product reads G once as well: there the kernel
saves the V and the launches (one for all matrices), no pass over G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.matrices import inspect_errors, inspect_matrices
from lightning_eff.kernels.row_sketch import reference

__all__ = ["MAX_RANK", "row_sketch", "signs"]

MAX_RANK = 16
"""Widest sketch: one random word gives the signs of all columns of V's row."""


def _check(op: str, rank: int, seed: int, streams: Sequence[int]) -> None:
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{op}: rank={rank!r} is not allowed: it must be from 1 to {MAX_RANK}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed={seed!r} is not allowed: it must be in [0, 2^64)")
    for index, stream in enumerate(streams):
        if not 0 <= stream < 2**32:
            raise ValueError(f"{op}: stream {index} is {stream!r}: it must be in [0, 2^32)")


def signs(columns: int, rank: int, seed: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """The random matrix V that :func:`row_sketch` uses, the same bits on every device.

    V[j, k] is -1 where bit k of the random word w(j) is set, else +1. w(j) is the first output word of Philox4x32-10
    (Salmon et al., SC 2011) with the counter (j, stream, 0, 0) and the key (seed mod 2^32, seed div 2^32).

    Args:
        columns: m, rows of V: the columns of the matrix to be sketched.
        rank: r, columns of V, 1 to 16.
        seed: in [0, 2^64); a new one for each step.
        stream: in [0, 2^32); another one for each matrix.
        device: where V is to be.

    Returns:
        float32 (columns, rank) of +-1.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> signs(4, 2, seed=7, stream=0)
        tensor([[-1.,  1.],
                [-1., -1.],
                [ 1.,  1.],
                [ 1., -1.]])
    """
    _check("signs", rank, seed, [stream])
    return reference.signs(columns, rank, seed, stream, torch.device(device))


def row_sketch(
    matrices: Sequence[Tensor],
    rank: int,
    seed: int,
    streams: Sequence[int] | None = None,
    errors: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sketch every row of a list of matrices: P = (G + E) V, accumulated in float32.

    The sum G + E is rounded to float32 once; products with +-1 are exact. A NaN or infinite row gives a non-finite row
    of P and touches no other. The reference is a float32 matrix product and follows torch's setting of its precision.

    Args:
        matrices: float32, bfloat16 or float16 matrices on one device, of any shapes and mixed at will. Float64 and
            non-contiguous ones take the reference.
        rank: r, width of the sketch, 1 to 16.
        seed: in [0, 2^64), equal on all ranks, a new one for each step.
        streams: a number in [0, 2^32) for each matrix, so that V does not depend on what else is in the list; None
            numbers them from 0.
        errors: a float32 matrix of the same shape for each, added before the product; None for none.

    Returns:
        float32 (total rows, rank): the sketches below each other in the order of the list, one buffer to be reduced.

    Raises:
        TypeError: something in a list is no dense floating tensor.
        ValueError: an argument out of its range, different devices, something that is no matrix, or errors that do not
            fit the matrices.

    Example:
        >>> G = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
        >>> row_sketch([G], rank=2, seed=7)
        tensor([[ 4., -2.],
                [ 0.,  0.]])
        >>> G @ signs(4, 2, seed=7, stream=0)
        tensor([[ 4., -2.],
                [ 0.,  0.]])
    """
    op = "row_sketch"
    inspected = inspect_matrices(op, matrices)
    streams = range(len(inspected.shapes)) if streams is None else streams
    _check(op, rank, seed, streams)
    if len(streams) != len(inspected.shapes):
        raise ValueError(f"{op}: {len(streams)} streams for {len(inspected.shapes)} matrices")
    kept = None if errors is None else inspect_errors(op, errors, inspected)
    device = inspected.listed.device
    if device is None:
        return torch.zeros((0, rank), dtype=torch.float32)
    obstacle = inspected.listed.obstacle or (kept.listed.obstacle if kept is not None else None)
    if choose(op, device, obstacle).implementation == "triton":
        from lightning_eff.kernels.row_sketch import kernel

        return kernel.row_sketch(inspected, kept, rank, seed, streams)
    return reference.row_sketch(matrices, errors, rank, seed, streams)
