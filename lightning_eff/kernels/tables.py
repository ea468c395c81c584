"""Lists of tensors as one table that a single launch can read: addresses, sizes and dtypes, cut into fixed chunks.

Gradients move: ``zero_grad(set_to_none=True)`` frees them every step, and a kernel that reads last step's addresses
reads freed memory. So the addresses are compared on every call, and only what they do not change is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that kernels take, with their number in a table."""

CHUNK = 16384
"""Elements that one program of a kernel reads: fixed, since it sets the order of the sums."""

_CACHE_SIZE = 64


@dataclass(frozen=True)
class TensorList:
    """What a call needs to know of its tensors, read in one walk over them.

    Attributes:
        device: of all tensors; None for an empty list.
        addresses: ``data_ptr`` of each.
        numels: elements of each.
        codes: number of each one's dtype in ``DTYPE_CODES``, -1 for a dtype that kernels do not take.
        obstacle: why kernels cannot take the list, None if they can.
    """

    device: torch.device | None
    addresses: tuple[int, ...]
    numels: tuple[int, ...]
    codes: tuple[int, ...]
    obstacle: str | None


def inspect(op: str, tensors: Sequence[Tensor], *, strided: bool = True, refuse: bool = True) -> TensorList:
    """Read a list of tensors, and refuse what no implementation could give a right number for.

    Args:
        op: name for the error messages.
        tensors: dense floating tensors on one device, of any shapes.
        strided: whether a permuted but gapless tensor (channels last, a transpose) is an obstacle for kernels. A
            sum over all elements does not mind their order.
        refuse: raise where no implementation of this package could give a right number; else call it an obstacle.

    Raises:
        TypeError: something is no tensor, sparse, or not of a floating dtype.
        ValueError: the tensors are on different devices.
    """
    if not refuse:
        try:
            return inspect(op, tensors, strided=strided)
        except (TypeError, ValueError) as error:
            return TensorList(tensors[0].device, (), (), (), str(error))
    device: torch.device | None = None
    obstacle: str | None = None
    addresses, numels, codes = [], [], []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: item {index} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: tensor {index} of shape {tuple(tensor.shape)} is sparse ({tensor.layout})")
        dtype = tensor.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"{op}: tensor {index} of shape {tuple(tensor.shape)} is {dtype}, not floating")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: tensors on different devices: 0 on {device}, {index} on {tensor.device}")
        code = DTYPE_CODES.get(dtype, -1)
        if code < 0:
            obstacle = f"tensor {index} has dtype {dtype}; kernels take float32, bfloat16 and float16"
        elif not tensor.is_contiguous() and (strided or not is_gapless(tensor)):
            obstacle = f"tensor {index} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous"
        addresses.append(tensor.data_ptr())
        numels.append(tensor.numel())
        codes.append(code)
    return TensorList(device, tuple(addresses), tuple(numels), tuple(codes), obstacle)


def is_gapless(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each place once, in whatever order."""
    expected = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in dims if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True)
class ChunkTable:
    """A list of tensors on the device, cut into chunks of ``CHUNK`` elements.

    Attributes:
        addresses: int64 (tensors,).
        numels: int64 (tensors,).
        codes: int32 (tensors,), see ``DTYPE_CODES``.
        owners: int32 (chunks,), the tensor that a chunk belongs to.
        positions: int32 (chunks,), a chunk's number within its tensor.
        firsts: int32 (tensors + 1,), the number of each tensor's first chunk; the last entry is ``chunks``.
        chunks: how many there are. Zero-size tensors have none.
    """

    addresses: Tensor
    numels: Tensor
    codes: Tensor
    owners: Tensor
    positions: Tensor
    firsts: Tensor
    chunks: int


def stream_of(device: torch.device) -> int:
    """The current stream's number, part of every cache's key.

    A table filled by a copy on one stream must not be read on another before that copy is done.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_layouts: OrderedDict[object, tuple[tuple[int, ...], ChunkTable]] = OrderedDict()


def chunk_table(listed: TensorList, role: str = "") -> ChunkTable:
    """The table of a non-empty list, from the cache where neither sizes nor addresses have changed.

    Args:
        listed: what :func:`inspect` has read.
        role: tells lists of equal sizes apart that are used in turn, so that each finds its own addresses again.
    """
    assert listed.device is not None
    key = (role, listed.device, stream_of(listed.device), listed.numels, listed.codes)
    cached = _layouts.get(key)
    if cached is not None:
        _layouts.move_to_end(key)
        addresses, table = cached
        if addresses == listed.addresses:
            return table
        table = ChunkTable(**{**vars(table), "addresses": to_device(listed.addresses, torch.int64, listed.device)})
    else:
        table = _new_table(listed, listed.device)
    _layouts[key] = (listed.addresses, table)
    if len(_layouts) > _CACHE_SIZE:
        _layouts.popitem(last=False)
    return table


def _new_table(listed: TensorList, device: torch.device) -> ChunkTable:
    numels = torch.tensor(listed.numels, dtype=torch.int64)
    counts = (numels + CHUNK - 1) // CHUNK
    firsts = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=firsts[1:])
    chunks = int(firsts[-1])
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    positions = torch.arange(chunks) - firsts[owners]
    return ChunkTable(
        to_device(listed.addresses, torch.int64, device),
        to_device(numels, torch.int64, device),
        to_device(listed.codes, torch.int32, device),
        to_device(owners, torch.int32, device),
        to_device(positions, torch.int32, device),
        to_device(firsts, torch.int32, device),
        chunks,
    )


def to_device(values: Tensor | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to ``device`` without waiting for it: from pinned memory, which the copy keeps until it is done."""
    host = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
