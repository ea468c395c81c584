"""The safetensors format, read and written one tensor at a time.

A file is 8 bytes with the length of the header (little-endian), the header in JSON (name -> dtype, shape and the place
in the data; ``__metadata__`` -> strings), and the data: every tensor in row-major order, little-endian, without gaps.
The package of that name wants a whole model in memory to write it; a merge has one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own reader


class Entry(NamedTuple):
    """One tensor of a file: its dtype and shape, and the bytes from ``start`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file and its metadata; no data is read.

    Raises:
        ValueError: the file is no safetensors file, or not all of it is there.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(length - 8, _LARGEST_HEADER):
            raise ValueError("the header is truncated, or this is no safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(size))
            metadata = header.pop(_METADATA, {})
            entries = {name: _entry(fields, 8 + size) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the header cannot be read: {error}") from error
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + size)
    if end != length:
        raise ValueError(f"it has {length} bytes where its header tells of {end}: truncated")
    return entries, metadata


def _entry(fields: Mapping[str, Any], offset: int) -> Entry:
    dtype, shape = DTYPES.get(fields["dtype"]), tuple(fields["shape"])
    if dtype is None:
        raise ValueError(f"dtype {fields['dtype']} is not supported")
    start, end = fields["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize or start < 0:
        raise ValueError(f"a tensor of {dtype} and shape {shape} cannot have {end - start} bytes")
    return Entry(dtype, shape, offset + start, end - start)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """One tensor, in memory of its own."""
    _refuse_big_endian()
    data = torch.empty(entry.size, dtype=torch.uint8)
    if entry.size:
        with path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(data.numpy()) != entry.size:  # type: ignore[arg-type]
                raise ValueError("the file became shorter while it was read")
    return data.view(entry.dtype).reshape(entry.shape)


def write(
    file: IO[bytes],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whose tensors are made one after the other.

    Args:
        file: open for writing in binary.
        tensors: name -> dtype and shape of what ``produce(name)`` will return.
        produce: called once for each name, in the order of their places in the file.
        metadata: strings that any reader shows.

    Raises:
        ValueError: the format does not have a dtype.
    """
    _refuse_big_endian()
    # The widest dtypes first, as the format's own writer does: every tensor is then aligned to its items.
    names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        if dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors has no {dtype}")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = produce(name)
        if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was made in place of {tensors[name]}")
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are in memory. A file of that name is replaced, and only once the new one is complete."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            write(file, shapes, tensors.__getitem__, metadata or {})
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    path = Path(path)
    return {name: read_tensor(path, entry) for name, entry in read_header(path)[0].items()}


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian, and this machine is not")
