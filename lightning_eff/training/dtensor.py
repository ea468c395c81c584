"""Parameters that are sharded over ranks: this rank's part of one, and the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_eff.functional.gradients import is_dtensor


def reshard(module: nn.Module) -> None:
    """Let FSDP2 show its shards, which a forward pass without a backward pass leaves gathered.

    A change of the shards would not be seen by a module that still holds its gathered weights.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds: a DTensor's shard, everything else as it is; shares memory with ``tensor``."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
        return part.detach()  # in this order: to detach a DTensor goes through its dispatch


def held(tensor: Tensor) -> Tensor:
    """The same for one that nothing is computed of, where there are many: a DTensor's shard itself, else ``tensor``."""
    part: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return part


def full(tensor: Tensor, like: Tensor) -> Tensor:
    """Put together what ``local`` has taken apart: ``tensor`` is this rank's part of one with the form of ``like``.

    Collective, if ``like`` is a DTensor.
    """
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            tensor.to(like.device),
            like.device_mesh,  # type: ignore[attr-defined]
            like.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        ).full_tensor()


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, in the form of ``like``; the inverse of ``full``.

    It stays on the device of ``whole``. No communication.
    """
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
        return local(distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)).to(whole.device)
