"""A checkpoint of which each rank has written its shards, checked: no byte has changed since it was written.

``torch.distributed.checkpoint`` writes each shard as ``torch.save`` does, one behind the other, with checksums that it
never looks at. The folder's ``.metadata`` says where each begins; it is a pickle, of which nothing but plain values
and torch's own classes for this is made here.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import defaultdict
from dataclasses import is_dataclass
from enum import Enum
from typing import IO, Any

import torch

from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage

REST = "meta.pt"
"""What is not sharded, as Lightning names it: by this it knows the folder again."""

_METADATA = ".metadata"
_CLASSES = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}
_NAMES = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _Unpickler(pickle.Unpickler):
    """Makes what torch puts into a ``.metadata``, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _NAMES or module in _CLASSES or module == "torch"
        found = super().find_class(module, name) if known and "." not in name else None
        record = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        if (module, name) in _NAMES or isinstance(found, torch.dtype | torch.layout) or (record and module in _CLASSES):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        self.file, self.begin, self.size, self.place = file, begin, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = max(0, start + offset)
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.place)
        self.file.seek(self.begin + self.place)
        content = self.file.read(left if size is None or size < 0 else min(size, left))
        self.place += len(content)
        return content


def is_sharded_folder(path: str) -> bool:
    """Whether it is a folder of shards, or what is left of one."""
    return os.path.isdir(path) and any(os.path.exists(os.path.join(path, name)) for name in (_METADATA, REST))


def folder_size(path: str) -> int:
    """Bytes of all of its files."""
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def folder_damage(path: str, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder of shards; None if it is whole.

    Args:
        path: of a folder on a local disk.
        part: which of the files are read, where several ranks share the work: those of this number.
        parts: into how many the work is divided.
    """
    try:
        with open(os.path.join(path, _METADATA), "rb") as file:
            stored = _Unpickler(file).load().storage_data
        found = damage(os.path.join(path, REST))
        files: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for info in stored.values():
            files[info.relative_path].append((info.offset, info.length))
    except FileNotFoundError as error:
        return f"{os.path.basename(str(error.filename))} is missing: it was not written to its end"
    except Exception as error:  # a pickle that makes no sense raises anything
        return f"its {_METADATA} is damaged: {error}"
    if found is not None:
        return f"its {REST}: {found}"
    for name in sorted(files)[part::parts]:
        found = _file_damage(os.path.join(path, name), sorted(files[name]))
        if found is not None:
            return f"its {name}: {found}"
    return None


def _file_damage(path: str, items: list[tuple[int, int]]) -> str | None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for begin, length in items:
                if begin + length > size:
                    return "it is cut off"
                with zipfile.ZipFile(_Part(file, begin, length)) as archive:
                    bad = archive.testzip()
                if bad is not None:
                    return f"the checksum of a record at byte {begin} is wrong"
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # zipfile has many for a directory that makes no sense
        return f"a record's directory is damaged: {error}"
    return None
