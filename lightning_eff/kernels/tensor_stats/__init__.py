"""L1 norm, squared L2 norm, L1 norm of the change, extremes and zeros of every tensor of a list, in one pass.

Byte count, for N bytes of tensors: the three statistics with an updated copy take 3N here (read the tensors and the
copies, write the copies); with ``torch._foreach_norm``, ``_foreach_sub`` and ``_foreach_copy_`` they take 8N (two
norms 2N, the difference 3N, its norm N, the copy 2N) and N of temporary memory. Without a copy N instead of 2N. The
largest element, zeros and non-finite ones come with the same N; by torch they take at least 3N more. Two launches,
whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.tables import inspect
from lightning_eff.kernels.tensor_stats import reference

__all__ = ["TensorStats", "tensor_stats"]


class TensorStats(NamedTuple):
    """One number for each tensor of a list, float64 (float32 on MPS) of shape (tensors,).

    Attributes:
        l1: sum of the absolute elements.
        squared_l2: sum of the squared elements.
        change_l1: sum of the absolute differences to the kept copies; None without copies.
        largest: the largest absolute element, infinity included and what is no number left out; None unless asked for.
        zeros: how many elements are zero; None unless asked for.
        nonfinite: how many are infinite or no number; None unless asked for.
    """

    l1: Tensor
    squared_l2: Tensor
    change_l1: Tensor | None
    largest: Tensor | None = None
    zeros: Tensor | None = None
    nonfinite: Tensor | None = None


def tensor_stats(
    tensors: Sequence[Tensor],
    copies: Sequence[Tensor] | None = None,
    *,
    update: Tensor | None = None,
    extremes: bool = False,
) -> TensorStats:
    """Take the statistics of each tensor of a list and, in the same pass, keep a copy of it for the next time.

    Accumulated in float32 within chunks of 16,384 elements and in float64 over these, in a fixed order. NaN and
    infinite elements show in the tensor's own numbers only.

    Args:
        tensors: float32, bfloat16 or float16 tensors of any shapes on one device, mixed at will; zero-size ones give
            zeros. Other dtypes, and tensors that are not laid out as their copies or have gaps, take the reference.
        copies: a tensor of the same shape and dtype for each; holds the old values before and the new ones after.
        update: 0-d tensor on the same device; where it is 0 (or False) the copies stay as they are, so that a
            non-finite gradient does not spoil the next difference. None always updates.
        extremes: also take the largest element and count zeros and what is not finite, in the same pass.

    Raises:
        TypeError: something in a list is no dense floating tensor.
        ValueError: the tensors are on different devices, or the copies do not fit the tensors.

    Example:
        >>> before = [torch.tensor([1.0, -2.0])]
        >>> stats = tensor_stats([torch.tensor([3.0, -4.0])], before)
        >>> stats.l1.item(), stats.squared_l2.item(), stats.change_l1.item()
        (7.0, 25.0, 4.0)
        >>> before
        [tensor([ 3., -4.])]
        >>> stats = tensor_stats([torch.tensor([0.0, -4.0, float("nan")])], extremes=True)
        >>> stats.largest.item(), stats.zeros.item(), stats.nonfinite.item()
        (4.0, 1.0, 1.0)
    """
    op = "tensor_stats"
    listed = inspect(op, tensors, strided=False)
    kept = None if copies is None else inspect(f"{op}, copies", copies, strided=False)
    obstacle = listed.obstacle
    if copies is not None and kept is not None:
        if len(copies) != len(tensors):
            raise ValueError(f"{op}: {len(copies)} copies for {len(tensors)} tensors")
        if kept.device != listed.device:
            raise ValueError(f"{op}: tensors on different devices: 0 on {listed.device}, copy 0 on {kept.device}")
        for index, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
            if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
                raise ValueError(
                    f"{op}: copy {index} of shape {tuple(copy.shape)} and {copy.dtype} does not fit its tensor of "
                    f"shape {tuple(tensor.shape)} and {tensor.dtype}"
                )
            if tensor.stride() != copy.stride():
                obstacle = f"copy {index} has strides {copy.stride()}, its tensor {tensor.stride()}"
    if listed.device is None:
        return _named(torch.zeros(6 if extremes else 3, 0, dtype=torch.float64), copies is not None)
    if update is not None and (update.numel() != 1 or update.device != listed.device):
        raise ValueError(
            f"{op}: update of shape {tuple(update.shape)} on {update.device} is not one number on {listed.device}"
        )
    obstacle = obstacle or (kept.obstacle if kept is not None else None)
    if choose(op, listed.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.tensor_stats import kernel

        rows = kernel.tensor_stats(listed, kept, update, extremes)
    else:
        rows = reference.tensor_stats(tensors, copies, update, extremes)
    return _named(rows, copies is not None)


def _named(rows: Tensor, changes: bool) -> TensorStats:
    return TensorStats(rows[0], rows[1], rows[2] if changes else None, *rows[3:])
