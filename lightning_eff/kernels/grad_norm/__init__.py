"""Sum of squares of a list of gradients, read once, and a scaling that costs nothing when there is nothing to scale.

Byte count, for N gradient bytes: ``torch.nn.utils.clip_grad_norm_`` reads 2N and writes N on every step. This op reads
N, and on a step whose coefficient is 1 no more; a clipped step reads another N and writes N; a step whose gradients
are to be zeroed (coefficient 0) writes N and reads none. Five launches, whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.grad_norm import reference
from lightning_eff.kernels.tables import TensorList, inspect

__all__ = ["read", "scale_", "sum_of_squares"]


def read(tensors: Sequence[Tensor], op: str = "grad_norm") -> TensorList:
    """Read a list of tensors once for several calls, which must not outlive its tensors' place in memory.

    Raises:
        TypeError: something in the list is no dense floating tensor.
        ValueError: the tensors are on different devices.
    """
    return inspect(op, tensors, strided=False)


def sum_of_squares(tensors: Sequence[Tensor] | TensorList) -> Tensor:
    """Sum of the squared elements of a list of tensors, in one pass over them.

    Accumulated in float32 within chunks (the kernel: of 16,384 elements) and in float64 over these, in a fixed order:
    the same gradients give the same bits, wherever they lie in memory. A NaN or an infinite element, or one whose
    square overflows float32 (above 1.8e19), makes the sum non-finite: it is the flag.

    Args:
        tensors: float32, bfloat16 or float16 tensors of any shapes on one device, mixed at will; zero-size ones
            count as nothing. Lists with other floating dtypes, or with gaps between elements, take the reference.
            What :func:`read` gave for a list saves reading it again.

    Returns:
        A 0-d float64 tensor (float32 on MPS) on the tensors' device; 0 on the CPU for an empty list.

    Raises:
        TypeError: something in the list is no dense floating tensor.
        ValueError: the tensors are on different devices.

    Example:
        >>> sum_of_squares([torch.tensor([3.0]), torch.tensor([4.0, 0.0])]).item()
        25.0
    """
    op = "grad_norm.sum_of_squares"
    listed = tensors if isinstance(tensors, TensorList) else read(tensors, op)
    if listed.device is None:
        return torch.zeros((), dtype=torch.float64)
    if choose(op, listed.device, listed.obstacle).implementation == "triton":
        from lightning_eff.kernels.grad_norm import kernel

        return kernel.sum_of_squares(listed)
    return reference.sum_of_squares(listed.tensors)


def scale_(tensors: Sequence[Tensor] | TensorList, coefficient: Tensor, *, zero_nonfinite: bool = False) -> None:
    """Multiply every tensor of a list in place by a coefficient that stays on the device.

    The product is taken in float32 and rounded once. The kernel, and on a CPU the reference, read and write nothing for
    a coefficient of 1 (once rounded to float32). For 0 the kernel writes zeros without reading, whatever the tensors
    hold.

    Args:
        tensors: as for :func:`sum_of_squares`.
        coefficient: 0-d floating tensor on the same device.
        zero_nonfinite: the coefficient is 0 where an element is NaN or infinite, and the result is to be 0 and not
            the NaN of ``inf * 0``. The reference takes one more pass for it where it cannot know the coefficient, on
            other devices than a CPU; the kernel does so in any case.

    Raises:
        TypeError: something in the list is no dense floating tensor, or the coefficient is no floating tensor.
        ValueError: the tensors or the coefficient are on different devices, or the coefficient is not one number.

    Example:
        >>> gradient = torch.tensor([2.0, float("inf")])
        >>> scale_([gradient], torch.tensor(0.0), zero_nonfinite=True)
        >>> gradient
        tensor([0., 0.])
    """
    op = "grad_norm.scale_"
    listed = tensors if isinstance(tensors, TensorList) else read(tensors, op)
    if not isinstance(coefficient, Tensor) or not coefficient.dtype.is_floating_point:
        raise TypeError(f"{op}: coefficient={coefficient!r} is not allowed: it must be a floating tensor")
    if coefficient.numel() != 1:
        raise ValueError(f"{op}: coefficient of shape {tuple(coefficient.shape)} is not one number")
    if listed.device is None:
        return
    if coefficient.device != listed.device:
        raise ValueError(
            f"{op}: tensors on different devices: 0 on {listed.device}, the coefficient on {coefficient.device}"
        )
    if choose(op, listed.device, listed.obstacle).implementation == "triton":
        from lightning_eff.kernels.grad_norm import kernel

        kernel.scale_(listed, coefficient)
    else:
        reference.scale_(listed.tensors, coefficient, zero_nonfinite)
