"""How a layer's inputs align with a vector: signs and histogram over the tokens, in one pass over the activations.

Byte count, for N bytes of activations: N here, 2N for ``x @ v`` and ``torch.linalg.vector_norm(x, dim=1)``, with a
dozen small launches more for the counts and the histogram. torch.compile can fuse the two reductions into one pass as
well, after a compilation for each shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_eff.kernels.alignment import reference
from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.matrices import MAX_COLUMNS
from lightning_eff.kernels.tables import inspect

__all__ = ["MAX_BINS", "AlignmentStats", "alignment_stats"]

MAX_BINS = 252
"""Most bins of the histogram: with the four counts a power of two that a program holds in registers."""


class AlignmentStats(NamedTuple):
    """Counts over the tokens, int64, on the device of the activations.

    Attributes:
        histogram: (bins,), finite alignments in equal bins over [-1, 1]; what lies outside by rounding, or because
            the vector has not length 1, counts in the first or last bin.
        positive: 0-d, tokens with a positive alignment.
        negative: 0-d, tokens with a negative one.
        zero: 0-d, tokens with none: padding, say.
        nonfinite: 0-d, tokens with a NaN or infinite element, or whose square overflows float32.
    """

    histogram: Tensor
    positive: Tensor
    negative: Tensor
    zero: Tensor
    nonfinite: Tensor


def alignment_stats(x: Tensor, v: Tensor, *, bins: int = 32, eps: float = 1e-6) -> AlignmentStats:
    """Count the tokens of ``x`` by the alignment <x, v> / (|x| + eps), in float32.

    Args:
        x: float32, bfloat16 or float16 activations of shape (..., in); the last dimension contiguous and the others
            one stride apart for the kernel, anything else takes the reference.
        v: floating (in,), of length 1 for the alignment to be a cosine; on the same device.
        bins: of the histogram, 1 to 252.
        eps: added to the norm, > 0.

    Returns:
        The counts; no value is read on the host.

    Raises:
        TypeError: ``x`` or ``v`` is no dense floating tensor.
        ValueError: shapes that do not fit, different devices, or an argument out of its range.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-3.0, 0.0], [0.0, 0.0]])
        >>> stats = alignment_stats(x, torch.tensor([1.0, 0.0]), bins=4)
        >>> stats.histogram
        tensor([1, 0, 1, 2])
        >>> stats.positive.item(), stats.negative.item(), stats.zero.item()
        (2, 1, 1)
    """
    op = "alignment_stats"
    listed = inspect(op, [x, v], strided=False)
    if x.ndim == 0 or v.ndim != 1 or x.shape[-1] != len(v):
        raise ValueError(
            f"{op}: x of shape {tuple(x.shape)} and v of shape {tuple(v.shape)} are not (..., in) and (in,)"
        )
    if not 1 <= bins <= MAX_BINS:
        raise ValueError(f"{op}: bins={bins!r} is not allowed: it must be from 1 to {MAX_BINS}")
    if not eps > 0:
        raise ValueError(f"{op}: eps={eps!r} is not allowed: it must be positive")
    assert listed.device is not None
    rows = x.reshape(-1, len(v)) if x.numel() else x.new_zeros((0, len(v)))
    obstacle = None
    if listed.codes[0] < 0:
        obstacle = f"x has dtype {x.dtype}; kernels take float32, bfloat16 and float16"
    elif rows.stride(1) != 1 or rows.stride(0) >= MAX_COLUMNS or rows.data_ptr() != x.data_ptr():
        obstacle = f"x of shape {tuple(x.shape)} has strides {x.stride()}"
    direction = v.to(torch.float32).contiguous()
    if len(rows) == 0:
        counts = torch.zeros(bins + 4, dtype=torch.int64, device=x.device)
    elif choose("alignment", listed.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.alignment import kernel

        counts = kernel.alignment_counts(rows, direction, bins, eps)
    else:
        counts = reference.alignment_counts(rows, direction, bins, eps)
    return AlignmentStats(counts[:bins], *counts[bins:].unbind())
