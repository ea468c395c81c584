"""Which gradients a list of parameters has on this rank, their global norm, and scaling them in place.

Plain tensors and DTensors (FSDP2, tensor parallelism) may be mixed. Nothing here waits for the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_eff.kernels import grad_norm

CPU_BLOCK = 2**15
"""Elements that the CPU's norm sums into one float32 before the float64 sum over blocks: it adds one after the other,
and over 16 million equal elements lost 1 % of the norm. On a GPU the reduction is a tree."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, without importing ``torch.distributed.tensor`` for those who have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Dtype of statistics kept on ``device``: float64, or float32 where there is no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that this rank holds: a DTensor's local shard, everything else as it is.

    The tensors share memory with ``parameter.grad``, so that an in-place change is a change of the gradient.

    Raises:
        TypeError: for a sparse gradient or a DTensor gradient that still awaits its reduction (``Partial``).
    """
    grads: list[Tensor] = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise TypeError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse ({grad.layout}); "
                "only dense gradients are supported: build the embedding with sparse=False"
            )
        if is_dtensor(grad):
            if any(placement.is_partial() for placement in grad.placements):  # type: ignore[attr-defined]
                raise TypeError(
                    f"the gradient of a parameter of shape {tuple(parameter.shape)} is a DTensor with placements "
                    f"{grad.placements}, which is not reduced yet: redistribute it first"  # type: ignore[attr-defined]
                )
            grad = grad.to_local()  # type: ignore[attr-defined]
        grads.append(grad)
    return grads


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squared elements of a non-empty list of dense tensors, as a 0-d tensor on the first one's device.

    Each tensor is accumulated in float32 (float64 for float64 tensors) whatever its own dtype, since a norm taken in
    float16 overflows and one taken in bfloat16 has three digits; the sum over tensors (on the CPU: over blocks of
    ``CPU_BLOCK`` elements) is taken in float64 (float32 on MPS). On a GPU one kernel does so in one pass over all
    tensors that it can take, see :mod:`lightning_eff.kernels.grad_norm`.
    """
    return grad_norm.sum_of_squares(tensors, otherwise=_sum_of_squares)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    dtype = statistics_dtype(device)
    total = torch.zeros((), dtype=dtype, device=device)
    for group in _by_device_and_dtype(tensors):
        accumulate = torch.float64 if group[0].dtype == torch.float64 else torch.float32
        if group[0].device.type == "cpu":
            group = [block for tensor in group for block in torch.split(tensor.reshape(-1), CPU_BLOCK)]
        norms = torch.stack(torch._foreach_norm(group, 2, dtype=accumulate))
        total += norms.to(device=device, dtype=dtype).square().sum()
    return total


def global_grad_norm(parameters: Sequence[Tensor]) -> Tensor | None:
    """L2 norm of all gradients of ``parameters`` over all ranks that share them, as a 0-d tensor.

    Plain gradients are taken as they are: under DDP they are equal on all ranks after the reduction. For DTensors the
    squares of the local shards are summed with one scalar all-reduce for each sharded dimension of each device mesh;
    dimensions that replicate are left out, so that HSDP is not counted once for each replica. Which collectives are
    issued depends on the parameters alone, so a rank without a gradient takes part as well.

    Args:
        parameters: leaf tensors of any shapes and floating dtypes.

    Returns:
        A 0-d float64 tensor (float32 on MPS), equal on all ranks, or None where there is nothing to measure: no
        parameter has a gradient and none is a DTensor.
    """
    plain: list[Tensor] = []
    sharded: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for parameter in parameters:
        if is_dtensor(parameter):
            placements = parameter.placements  # type: ignore[attr-defined]
            mesh_dims = tuple(dim for dim, placement in enumerate(placements) if placement.is_shard())
            sharded.setdefault((parameter.device_mesh, mesh_dims), []).append(parameter)  # type: ignore[attr-defined]
        else:
            plain.append(parameter)
    squares: list[Tensor] = []
    if grads := local_grads(plain):
        squares.append(sum_of_squares(grads))
    for (mesh, mesh_dims), members in sharded.items():
        grads = local_grads(members)
        device = members[0].to_local().device  # type: ignore[attr-defined]
        square = sum_of_squares(grads) if grads else torch.zeros((), dtype=statistics_dtype(device), device=device)
        for dim in mesh_dims:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    if not squares:
        return None
    total = squares[0]
    for square in squares[1:]:
        total = total + square.to(total.device)
    return total.sqrt()


def scale_(tensors: Sequence[Tensor], coefficient: Tensor, *, zero_nonfinite: bool = False) -> None:
    """Multiply every tensor of a list by a 0-d tensor, in place and without reading it on the host.

    Args:
        tensors: dense tensors of any shapes, devices and floating dtypes.
        coefficient: 0-d tensor.
        zero_nonfinite: first replace NaN and infinite elements by 0, so that a coefficient of 0 gives zeros and not
            the NaN of ``inf * 0``. One more pass over the tensors; a kernel, which never reads them for a coefficient
            of 0 nor at all for one of 1, needs none.
    """
    grad_norm.scale_(tensors, coefficient, otherwise=lambda some, factor: _scale_(some, factor, zero_nonfinite))


def _scale_(tensors: Sequence[Tensor], coefficient: Tensor, zero_nonfinite: bool) -> None:
    for group in _by_device_and_dtype(tensors):
        if zero_nonfinite:
            for tensor in group:
                tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        # 16-bit gradients are scaled by a float32 coefficient: rounding it to bfloat16 would miss by up to 0.4 %.
        dtype = torch.float64 if group[0].dtype == torch.float64 else torch.float32
        torch._foreach_mul_(group, coefficient.to(device=group[0].device, dtype=dtype))


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups that one ``torch._foreach`` call can take; complex ones as pairs of reals."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        groups.setdefault((real.device, real.dtype), []).append(real)
    return list(groups.values())
