"""A checkpoint as the file that ``torch.save`` writes: taken apart, put together from memory, and checked.

That file is a zip archive: a pickle in which each storage is a key, and a record of bytes for each of them
(https://docs.pytorch.org/docs/stable/notes/serialization.html). A zip archive has a CRC-32 for each of its records,
which ``torch.load`` never looks at. So the checksum needs no format of ours: ``damage`` checks every file of torch's.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import UntypedStorage
from torch.serialization import get_unsafe_globals_in_checkpoint

_PROTOCOL = 2  # torch's, the one that `weights_only=True` reads
_ALIGNMENT = 64  # torch's too: a tensor of a mapped file begins where a processor likes it
_CHUNK = 16 * 1024 * 1024
_PADDING = 0x4246  # torch's own mark of an extra field that only fills


class _Pickler(pickle.Pickler):
    """Pickles everything but the bytes of storages."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        self.storages: list[UntypedStorage] = []
        self._keys: dict[tuple[int, Any], str] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            typed: Any = obj
            storage, kind, count = typed._untyped_storage, getattr(torch, typed._pickle_storage_type()), typed._size()
        elif isinstance(obj, UntypedStorage):
            storage, kind, count = obj, UntypedStorage, obj.nbytes()
        else:
            return None
        # A key has one dtype when it is loaded: what two dtypes look at is written twice.
        key = self._keys.setdefault((storage._cdata, kind), str(len(self.storages)))
        if int(key) == len(self.storages):
            self.storages.append(storage)
        return ("storage", kind, key, "cpu", count)


def take_apart(checkpoint: Any) -> tuple[bytes, list[UntypedStorage]]:
    """A pickle in which storages are keys, and the storages in the order of these, none of them copied.

    All that is not a tensor is as it is now, whatever happens to it later.

    Example:
        >>> weight = torch.zeros(3)
        >>> pickled, storages = take_apart({"weight": weight, "tied": weight.view(3, 1), "step": 5})
        >>> [storage.nbytes() for storage in storages]
        [12]
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(checkpoint)
    return stream.getvalue(), pickler.storages


def put_together(stream: IO[bytes], pickled: bytes, storages: Sequence[memoryview]) -> None:
    """Write the file to a stream that can seek."""
    records: dict[str, Any] = {"data.pkl": pickled, "byteorder": sys.byteorder.encode()}
    records |= {f"data/{key}": storage for key, storage in enumerate(storages)}
    records["version"] = b"3\n"
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            _add(archive, stream, f"archive/{name}", memoryview(content))


def _add(archive: zipfile.ZipFile, stream: IO[bytes], name: str, content: memoryview) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = len(content)
    large = len(content) * 1.05 > zipfile.ZIP64_LIMIT
    header = 30 + len(name) + 4 + (20 if large else 0)  # of a zip archive: fixed, the name, two extra fields
    padding = -(stream.tell() + header) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as record:
        for begin in range(0, len(content), _CHUNK):  # in pieces, of which the checksum finds each in the cache
            record.write(content[begin : begin + _CHUNK])
    info.extra = b""  # the directory at the end needs no padding


def damage(path: Any) -> str | None:
    """What is wrong with a file that ``torch.save`` or this suite has written; None if it is whole.

    Reads all of it. Local paths and those of fsspec.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "some.ckpt")
        >>> torch.save({"weight": torch.zeros(1000)}, path)
        >>> damage(path)
        >>> os.truncate(path, 3000)
        >>> damage(path)
        'it is cut off, or no checkpoint: File is not a zip file'
    """
    try:
        with get_filesystem(path).open(str(path), "rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                bad = archive.testzip() if has_checksums(archive) else None
            if bad is None:
                stream.seek(0)
                get_unsafe_globals_in_checkpoint(stream)  # torch's own reading of the directory, which loads nothing
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        return f"it is cut off, or no checkpoint: {error}"
    except Exception as error:  # zipfile and torch have many for a directory that makes no sense
        return f"its directory is damaged: {error}"
    return None if bad is None else f"the checksum of its record {bad} is wrong"


def has_checksums(archive: zipfile.ZipFile) -> bool:
    """False for a file that was written with ``torch.utils.serialization.config.save.compute_crc32 = False``."""
    return any(info.CRC for info in archive.infolist() if info.file_size) or not archive.infolist()


def check_whole(path: Any) -> None:
    """Refuse to load a damaged file.

    Raises:
        RuntimeError: with the path and what is wrong.
    """
    found = damage(path)
    if found is not None:
        raise RuntimeError(
            f"{path} is damaged: {found}; resume from another checkpoint (`lightning-eff verify FILE ...` checks them)"
        )


def describe(path: Any) -> Mapping[str, Any]:
    """For people: how many records of how many bytes a whole file has, and whether it has checksums."""
    with get_filesystem(path).open(str(path), "rb") as stream, zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        return {
            "records": len(infos),
            "bytes": sum(info.file_size for info in infos),
            "checksums": has_checksums(archive),
        }
