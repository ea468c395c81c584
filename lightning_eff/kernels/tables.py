"""Lists of tensors as one table that a single launch can read: addresses, sizes and dtypes, cut into fixed chunks.

Gradients move: ``zero_grad(set_to_none=True)`` frees them every step, and a kernel that reads last step's addresses
reads freed memory. So what is kept from call to call is a function of what it was made from, compared on every call:
sizes and dtypes for the map of the chunks, the addresses for their own table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that kernels take, with their number in a table."""

CHUNK = 16384
"""Elements that one program of a kernel reads: fixed, since it sets the order of the sums."""

CACHE_SIZE = 1024
"""Tables that are kept of each kind. DDP's buckets ask for theirs in turn, one to three each: with fewer places than
that the oldest is always the one that is needed next, and nothing is ever found."""


@dataclass(frozen=True)
class TensorList:
    """What a call needs to know of its tensors, read in one walk over them.

    Attributes:
        tensors: the list itself.
        device: of all tensors; None for an empty list.
        numels: elements of each.
        codes: number of each one's dtype in ``DTYPE_CODES``, -1 for a dtype that kernels do not take.
        obstacle: why kernels cannot take the list, None if they can.
    """

    tensors: Sequence[Tensor]
    device: torch.device | None
    numels: tuple[int, ...]
    codes: tuple[int, ...]
    obstacle: str | None

    @property
    def addresses(self) -> tuple[int, ...]:
        """``data_ptr`` of each, read anew: only a kernel asks for them, and a fake tensor has none."""
        return tuple(tensor.data_ptr() for tensor in self.tensors)


def inspect(op: str, tensors: Sequence[Tensor], *, strided: bool = True) -> TensorList:
    """Read a list of tensors, and refuse what no implementation could give a right number for.

    Args:
        op: name for the error messages.
        tensors: dense floating tensors on one device, of any shapes.
        strided: whether a permuted but gapless tensor (channels last, a transpose) is an obstacle for kernels. A
            sum over all elements does not mind their order.

    Raises:
        TypeError: something is no tensor, sparse, or not of a floating dtype.
        ValueError: the tensors are on different devices.
    """
    device: torch.device | None = None
    obstacle: str | None = None
    numels, codes = [], []
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
        numels.append(tensor.numel())
        codes.append(code)
    return TensorList(tensors, device, tuple(numels), tuple(codes), obstacle)


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
    """How a list of tensors is cut into chunks of ``CHUNK`` elements; everything but the addresses.

    Attributes:
        numels: int64 (tensors,).
        codes: int32 (tensors,), see ``DTYPE_CODES``.
        owners: int32 (chunks,), the tensor that a chunk belongs to.
        positions: int32 (chunks,), a chunk's number within its tensor.
        firsts: int32 (tensors + 1,), the number of each tensor's first chunk; the last entry is ``chunks``.
        chunks: how many there are. Zero-size tensors have none.
    """

    numels: Tensor
    codes: Tensor
    owners: Tensor
    positions: Tensor
    firsts: Tensor
    chunks: int


def stream_of(device: torch.device) -> int:
    """The current stream's number, part of every table's key.

    A table filled by a copy on one stream must not be read on another before that copy is done.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def address_table(listed: TensorList) -> Tensor:
    """int64 (tensors,) on the device: where the tensors lie now."""
    assert listed.device is not None
    return _addresses(listed.device, stream_of(listed.device), listed.addresses)


@functools.lru_cache(CACHE_SIZE)
def _addresses(device: torch.device, stream: int, addresses: tuple[int, ...]) -> Tensor:
    return to_device(addresses, torch.int64, device)


def chunk_table(listed: TensorList) -> ChunkTable:
    """The chunks of a non-empty list."""
    assert listed.device is not None
    return _chunks(listed.device, stream_of(listed.device), listed.numels, listed.codes)


@functools.lru_cache(CACHE_SIZE)
def _chunks(device: torch.device, stream: int, sizes: tuple[int, ...], codes: tuple[int, ...]) -> ChunkTable:
    numels = torch.tensor(sizes, dtype=torch.int64)
    counts = (numels + CHUNK - 1) // CHUNK
    firsts = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=firsts[1:])
    chunks = int(firsts[-1])
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    positions = torch.arange(chunks) - firsts[owners]
    return ChunkTable(
        numels=to_device(numels, torch.int64, device),
        codes=to_device(codes, torch.int32, device),
        owners=to_device(owners, torch.int32, device),
        positions=to_device(positions, torch.int32, device),
        firsts=to_device(firsts, torch.int32, device),
        chunks=chunks,
    )


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can read it without waiting: it is in its memory, holds data, and nothing compiles or traces."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not traced


def value_at_hand(number: Tensor) -> float | None:
    """Of a 0-d tensor; None where it is not at hand."""
    return number.item() if is_at_hand(number) else None


def to_device(values: Tensor | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to ``device`` without waiting for it: from pinned memory, which the copy keeps until it is done."""
    host = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    pinned = host.pin_memory()
    table = _to_cuda(pinned, device)
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED.extend((pinned, table))
    return table


def _to_cuda(pinned: Tensor, device: torch.device) -> Tensor:
    return pinned.to(device, non_blocking=True)


_CAPTURED: list[Tensor] = []
"""What a CUDA graph copies again in every replay: kept, as a graph may live as long as the process."""
