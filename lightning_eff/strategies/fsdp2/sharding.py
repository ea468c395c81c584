"""A module of any kind, sharded block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.structure import clean_named_modules, clean_named_parameters, find_blocks
from lightning_eff.structure.select import select
from lightning_eff.training.namespaces import MisconfigurationException


def is_sharded(module: nn.Module) -> bool:
    """Whether somebody has sharded it, by FSDP2 or by tensor parallelism."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(map(is_dtensor, module.parameters()))


def shard(
    module: LightningModule, mesh: DeviceMesh, device: torch.device, exclude: Sequence[str], reshard_after_forward: bool
) -> list[str]:
    """Shard the repeated blocks, and all that is left as one group of the module itself; collective.

    All ranks begin with the weights and buffers of rank zero, as under DDP. A block goes to the device just before it
    is sharded, so that the device never holds the whole module. What is on the meta device stays there.

    Returns:
        The names of the blocks.
    """
    _check_dimensions(module)
    modules = clean_named_modules(module)
    blocks = blocks_to_shard(module, exclude)
    _check_types(module, blocks)
    for name in (*blocks, ""):
        part = modules[name] if name else module
        held = [tensor for tensor in (*part.parameters(), *part.buffers()) if not is_dtensor(tensor)]
        if not any(tensor.is_meta for tensor in held):
            part.to(device)
            # `to` may have put buffers in the place of others.
            held = [tensor for tensor in (*part.parameters(), *part.buffers()) if not is_dtensor(tensor)]
            for parameter in part.parameters():
                if not is_dtensor(parameter) and not parameter.is_contiguous():  # channels last, or a transposed one
                    parameter.data = parameter.data.contiguous()
            broadcast_from_rank_zero(held)
        sharded = (
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
            if name
            else fully_shard(part, mesh=mesh)
        )
        if device.type == "cpu":
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no mean: torch 2.8 took the sum for it
    return blocks


def blocks_to_shard(module: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Names of the blocks that are sharded each by itself: repeated ones that share no parameter."""
    modules = clean_named_modules(module)
    blocks = [block.name for block in find_blocks(module)]
    if exclude:
        left_out = set(select(blocks, exclude, "exclude", "block"))
        blocks = [name for name in blocks if name not in left_out]
    return _without_shared(module, {name: modules[name] for name in blocks})


def broadcast_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Give all ranks the contents that rank zero has, in one broadcast of bytes whatever the types are."""
    # The widest elements first, so that each begins where its type may begin.
    order = sorted((t.detach() for t in tensors if t.numel()), key=lambda t: t.element_size(), reverse=True)
    if not order or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.reshape(-1).view(torch.uint8) for t in order])
    dist.broadcast(flat, src=0)
    pieces = torch.split(flat, [t.numel() * t.element_size() for t in order])
    for tensor, piece in zip(order, pieces, strict=True):
        tensor.copy_(piece.view(tensor.dtype).view(tensor.shape))


def _check_dimensions(module: LightningModule) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise MisconfigurationException(
                f"FSDP2 shards the first dimension of a parameter, and {name} has none: give it the shape (1,), as in "
                "nn.Parameter(torch.ones(1))"
            )


def _check_types(module: LightningModule, blocks: Sequence[str]) -> None:
    """FSDP2 reduces the gradients of a group in one tensor: torch itself says so at the first step only."""
    groups: dict[str, dict[torch.dtype, str]] = {}
    for name, parameter in clean_named_parameters(module).items():
        if parameter.requires_grad:
            group = next((block for block in blocks if name.startswith(f"{block}.")), "")
            groups.setdefault(group, {}).setdefault(parameter.dtype, name)
    for group, types in groups.items():
        if len(types) > 1:
            found = " and ".join(f"{name} is {dtype}" for dtype, name in types.items())
            raise MisconfigurationException(
                f"FSDP2 shards {group or 'all that lies in no block'} as one, with trainable parameters of one type: "
                f"{found}. Give them one, with precision='bf16-mixed' where they are to be computed with in bfloat16, "
                "or freeze those of the other"
            )


def _without_shared(module: nn.Module, blocks: dict[str, nn.Module]) -> list[str]:
    """The blocks whose parameters nobody else holds, neither another block nor what lies outside of all."""
    holders = Counter(id(parameter) for block in blocks.values() for parameter in block.parameters())
    inside = {id(part) for block in blocks.values() for part in block.modules()}
    outside = {id(p) for part in module.modules() if id(part) not in inside for p in part.parameters(recurse=False)}
    return [
        name
        for name, block in blocks.items()
        if all(holders[id(parameter)] == 1 and id(parameter) not in outside for parameter in block.parameters())
    ]
