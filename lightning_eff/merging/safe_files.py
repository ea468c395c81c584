"""Models written in the safetensors format, by the package of that name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor


def save_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, with the permissions that any new file gets: the package would make it the owner's alone.

    Raises:
        OSError: it cannot be written.
        ValueError: the format does not have a dtype.
    """
    tensors = separate(tensors)
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        save_file(tensors, path, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    os.chmod(path, mode & 0o777)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What :func:`save_safetensors` writes, in memory, for what is no local file."""
    return save(separate(tensors), dict(metadata))


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, and none in another's memory, for the format has no ties: those are copied.

    Raises:
        ValueError: the format does not have a dtype.
    """
    check_dtypes({name: tensor.dtype for name, tensor in tensors.items()})
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise the ValueError of a dtype that the format, or the version of its package, does not have."""
    for name, dtype in dtypes.items():
        if not _has(dtype):
            raise ValueError(f"{name}: safetensors has no {dtype}")


@cache
def _has(dtype: torch.dtype) -> bool:
    try:
        save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, SafetensorError):
        return False
    return True
