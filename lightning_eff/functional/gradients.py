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

    Accumulated in float32 (float64 for float64 tensors) whatever the tensors' own dtype, since a norm taken in float16
    overflows and one taken in bfloat16 has three digits; over tensors in float64 (float32 on MPS). On a GPU one kernel
    reads them all once, see :mod:`lightning_eff.kernels.grad_norm`.
    """
    first, *others = [grad_norm.sum_of_squares(group) for group in _by_device(tensors)]
    return sum((square.to(first.device) for square in others), first)


def squared_grad_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Squared L2 norm of the gradients of each group of parameters over all ranks that share them.

    Plain gradients are taken as they are: under DDP they are equal on all ranks after the reduction. For DTensors the
    squares of the local shards are summed with one all-reduce of a number for each group, for each sharded dimension of
    each device mesh; dimensions that replicate are left out, so that HSDP is not counted once for each replica. Which
    collectives are issued depends on the parameters alone, so a rank without a gradient takes part as well.

    Args:
        groups: leaf tensors of any shapes and floating dtypes.

    Returns:
        A float64 tensor (float32 on MPS) of shape (len(groups),), equal on all ranks, 0 for a group without gradients,
        or None where there is nothing to measure: no parameter has a gradient and none is a DTensor.
    """
    plain: list[list[Tensor]] = []
    sharded: dict[tuple[Any, tuple[int, ...]], list[list[Tensor]]] = {}
    for number, group in enumerate(groups):
        plain.append([])
        for parameter in group:
            if is_dtensor(parameter):
                placements = parameter.placements  # type: ignore[attr-defined]
                mesh_dims = tuple(dim for dim, placement in enumerate(placements) if placement.is_shard())
                key = (parameter.device_mesh, mesh_dims)  # type: ignore[attr-defined]
                sharded.setdefault(key, [[] for _ in groups])[number].append(parameter)
            else:
                plain[number].append(parameter)
    parts: list[Tensor] = []
    grads = [local_grads(members) for members in plain]
    if any(grads):
        parts.append(_squares(grads, next(group[0] for group in grads if group).device))
    for (mesh, mesh_dims), members in sharded.items():
        device = next(group[0] for group in members if group).to_local().device  # type: ignore[attr-defined]
        squares = _squares([local_grads(group) for group in members], device)
        for dim in mesh_dims:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
        parts.append(squares)
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _squares(groups: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    nothing = torch.zeros((), dtype=statistics_dtype(device), device=device)
    return torch.stack([sum_of_squares(group).to(device) if group else nothing for group in groups])


def global_grad_norm(parameters: Sequence[Tensor]) -> Tensor | None:
    """L2 norm of all gradients of ``parameters`` over all ranks, as a 0-d tensor; see ``squared_grad_norms``."""
    squares = squared_grad_norms([parameters])
    return None if squares is None else squares[0].sqrt()


def scale_(tensors: Sequence[Tensor], coefficient: Tensor, *, zero_nonfinite: bool = False) -> None:
    """Multiply every tensor of a list by a 0-d tensor, in place and without reading it on the host.

    Args:
        tensors: dense tensors of any shapes, devices and floating dtypes.
        coefficient: 0-d tensor.
        zero_nonfinite: the coefficient is 0 where an element is NaN or infinite, and the result is to be 0 and not
            the NaN of ``inf * 0``. One more pass over the tensors; the kernel, which never reads them for a
            coefficient of 0 nor at all for one of 1, needs none.
    """
    for group in _by_device(tensors):
        grad_norm.scale_(group, coefficient.to(group[0].device), zero_nonfinite=zero_nonfinite)


def _by_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups on one device; complex ones as pairs of reals."""
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    return list(groups.values())
