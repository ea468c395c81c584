"""What the members of a quorum do together: reductions, gathering and sending, with nothing that is unpickled."""

from __future__ import annotations

import io
import pathlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.process_group import Gloo


def summed(group: Gloo, tensor: torch.Tensor, op: Any) -> torch.Tensor:
    """Reduce a tensor in place over a group and wait for it."""
    options = AllreduceOptions()
    options.reduceOp = op
    group.allreduce([tensor], options).wait()
    return tensor


_OPERATIONS = {"max": ReduceOp.MAX, "min": ReduceOp.MIN, "product": ReduceOp.PRODUCT}


def reduce(group: Gloo, value: Tensor, name: str, count: int | None, each: int = 1) -> Tensor:
    """Reduce a tensor over the members, in place.

    Args:
        group: of the members.
        value: of this one; for a mean the sum of what it has.
        name: "mean", "avg", "sum", "max", "min" or "product".
        count: of how many values it is the mean, by default ``each`` for each member.
        each: values that each member has summed up.
    """
    total = summed(group, value, _OPERATIONS.get(name, ReduceOp.SUM))
    return mean_of(total, name, count or group.world * each)


def mean_of(total: Tensor, name: str, count: int) -> Tensor:
    """The end of a reduction: a sum is divided if it is to be a mean."""
    return (total / count).to(total.dtype) if name in ("mean", "avg", "none") else total


def combine(values: Tensor, name: str) -> Tensor:
    """Those of one replica, before they are reduced over all: a mean is divided in the end."""
    if name in ("max", "min"):
        return values.amax(0) if name == "max" else values.amin(0)
    return values.prod(0) if name == "product" else values.sum(0)


def spread(group: Gloo, tensor: Tensor, source: int) -> Tensor:
    """Give the values of the member with rank ``source`` to all, in place, and wait for them."""
    options = BroadcastOptions()
    options.rootRank = source
    group.broadcast([tensor], options).wait()
    return tensor


def gather_rows(group: Gloo, row: list[int]) -> list[list[int]]:
    """The integers of every member, by rank."""
    mine = torch.tensor(row)
    rows = [torch.empty_like(mine) for _ in range(group.world)]
    group.allgather([rows], [mine], AllgatherOptions()).wait()
    return [each.tolist() for each in rows]


def gather_tensors(group: Gloo, tensor: Tensor) -> list[Tensor]:
    """A tensor of the same shape from every member, by rank."""
    mine = tensor.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.world)]
    group.allgather([parts], [mine], AllgatherOptions()).wait()
    return parts


def gather_texts(group: Gloo, text: str) -> list[str]:
    """A short text from every member, by rank."""
    data = text.encode().ljust(256)
    parts = gather_tensors(group, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return [part.numpy().tobytes().decode().strip() for part in parts]


def gather_objects(group: Gloo, value: Any) -> list[Any]:
    """Tensors and plain Python values of every member, by rank."""
    data = pack(value)
    sizes = [row[0] for row in gather_rows(group, [len(data)])]
    padded = torch.nn.functional.pad(data, (0, max(sizes) - len(data)))
    parts = gather_tensors(group, padded)
    return [unpack(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def pack(value: Any) -> Tensor:
    """Tensors and plain Python values as bytes, in one copy: it may be a whole training state."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def unpack(content: Tensor) -> Any:
    """What `pack` was given, on the CPU."""
    with torch.serialization.safe_globals([pathlib.PosixPath]):
        return torch.load(io.BytesIO(content.numpy().data), map_location="cpu", weights_only=True)


def send_object(group: Gloo, value: Any, source: int) -> Any:
    """What the member with rank ``source`` holds, for all; tensors and plain Python values, nothing is unpickled."""
    return unpack(send_bytes(group, pack(value) if group.rank == source else None, source))


def send_bytes(group: Gloo, content: Tensor | None, source: int) -> Tensor:
    """Bytes of the member with rank ``source``, which alone gives them, for all."""
    length = int(spread(group, torch.tensor([0 if content is None else len(content)]), source))
    return spread(group, torch.empty(length, dtype=torch.uint8) if content is None else content, source)


def nothing(group: Gloo) -> None:
    """Only wait for each other."""
    summed(group, torch.zeros(1), ReduceOp.SUM)
