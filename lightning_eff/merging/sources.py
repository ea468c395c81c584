"""Checkpoints of every kind, opened to read one tensor at a time: name, dtype and shape of all are known before."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_eff.arguments import check_path


class Spec(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def averaged(self) -> bool:
        """Whether an average of such a tensor has a meaning: not of counters, masks and indices."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


class Source(ABC):
    """One checkpoint.

    Attributes:
        path: where it is.
        specs: name -> dtype and shape of every tensor, in the order of the checkpoint.
        tied: groups of names that are one tensor (the checkpoint holds it once).
        extra: what a state dict holds beside tensors (from ``get_extra_state``).
        rest: what a Lightning checkpoint holds beside the weights: hyperparameters, epoch, global_step.
        step: optimizer steps behind it, None where it does not say.
        sigma_rel: the width, if it is a power-function average that says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self.tied: list[tuple[str, ...]] = []
        self.extra: dict[str, Any] = {}
        self.rest: dict[str, Any] = {}
        self.step: int | None = None
        self.sigma_rel: float | None = None

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; to be dropped, and not changed, before :meth:`forget`."""

    def forget(self, name: str) -> None:  # noqa: B027  (nothing to do for most)
        """The memory behind a tensor that was read can go."""


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a Lightning or plain torch checkpoint, a safetensors file, or a sharded checkpoint (a folder).

    Args:
        path: the file or the folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read: truncated, of another kind, or with Python objects inside.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.ones(2, 3)}, f"{folder}/model.pt")
        ...     source = open_source(f"{folder}/model.pt")
        ...     print(source.specs["weight"])
        float32 (2, 3)
    """
    check_path("path", path)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        if path.is_dir():
            return _ShardedSource(path)
        if path.suffix == ".safetensors":
            return _SafetensorsSource(path)
        return _TorchSource(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _TorchSource(Source):
    """A file of `torch.save`, mapped into memory: Lightning's, or a state dict."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        checkpoint = load_mapped(path)
        state = checkpoint.get("state_dict", checkpoint)
        others = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if "state_dict" not in checkpoint and others:
            raise ValueError(f"it has no state_dict, and is none: {others[0]!r} is no tensor")
        unusual = [name for name, value in state.items() if isinstance(value, Tensor) and _unusual(value)]
        if unusual:
            raise ValueError(f"{unusual[0]!r} is a sparse or quantized tensor, which cannot be averaged")
        self._state = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
        self.extra = {name: state[name] for name in others}
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._state.items()}
        self.tied = _tied(self._state)
        if state is not checkpoint:
            self.rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        average = self.rest.get("lightning_eff_average")
        average = average if isinstance(average, dict) else {}
        # The averages count real updates, and their profiles are by that count.
        self.step = _integer(average.get("step", self.rest.get("global_step")))
        self.sigma_rel = _number(average.get("sigma_rel"))

    def read(self, name: str) -> Tensor:
        return self._state[name]

    def forget(self, name: str) -> None:
        _drop_pages(self._state[name])


class _SafetensorsSource(Source):
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file = safe_open(path, framework="pt")
            for name in self._file.keys():  # noqa: SIM118  (it is no mapping)
                tensor = self._file.get_tensor(name)  # of which nothing is read until it is used
                self.specs[name] = Spec(tensor.dtype, tuple(tensor.shape))
        except SafetensorError as error:
            raise ValueError(f"it is truncated, or no safetensors file ({error})") from error
        metadata = self._file.metadata() or {}
        self.step = _integer(metadata.get("step", metadata.get("global_step")))
        self.sigma_rel = _number(metadata.get("sigma_rel"))

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def forget(self, name: str) -> None:
        _drop_pages(self._file.get_tensor(name))


class _ShardedSource(Source):
    """A folder of `torch.distributed.checkpoint`, as FSDP2 under Lightning saves it; its shards are put together."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        if not (path / ".metadata").is_file():
            raise ValueError("this folder is no sharded checkpoint: it has no .metadata")
        try:
            metadata = FileSystemReader(path).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f".metadata cannot be read: {error}") from error
        self._check_files(metadata.storage_data)

        # The metadata is read once, and not for every tensor again.
        class Reader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
                return metadata

        self._reader = Reader
        tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        prefix = "state_dict." if any(key.startswith("state_dict.") for key in tensors) else ""
        self._keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        self.specs = {
            name: Spec(tensors[key].properties.dtype, tuple(tensors[key].size)) for name, key in self._keys.items()
        }
        if (path / "meta.pt").is_file():
            self.rest = load_mapped(path / "meta.pt")
        self.step = _integer(self.rest.get("global_step"))

    def _check_files(self, storage: Mapping[Any, Any]) -> None:
        ends: dict[str, int] = {}
        for place in storage.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"its file {name} is missing")
            if file.stat().st_size < end:
                raise ValueError(f"its file {name} is truncated: {file.stat().st_size} bytes of {end}")

    def read(self, name: str) -> Tensor:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        with warnings.catch_warnings():  # "assuming the intent is to load in a single process": it is
            warnings.filterwarnings("ignore", message="torch.distributed is ", category=UserWarning)
            try:
                load({self._keys[name]: tensor}, storage_reader=self._reader(self.path), no_dist=True)
            except (CheckpointException, RuntimeError) as error:
                raise ValueError(f"{self.path}: {name} cannot be read: {error}") from error
        return tensor


def load_mapped(path: Path) -> dict[str, Any]:
    """A file of `torch.save` as plain data, its tensors mapped and not read.

    Raises:
        ValueError: it is truncated, no such file, not a dict, or holds Python objects.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]
        raise ValueError(
            f"it holds Python objects, which are not loaded because they can run code ({reason}). Save it anew with "
            "plain data only: hyperparameters as numbers, strings, lists and dicts"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        if "mmap" in str(error):
            raise ValueError("it is no zip file: saved before torch 1.6, or truncated") from error
        raise ValueError(f"it is truncated, or no file of torch.save ({str(error).split('. ')[0]})") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, and no dict")
    return checkpoint


def _unusual(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized


def _tied(state: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            groups.setdefault(place, []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _drop_pages(tensor: Tensor) -> None:
    """Tell the system that the pages behind a mapped tensor are not needed.

    Otherwise every file that was read stays in memory, and counts as this process's, until others need the room. What
    is dropped is read again from the file when it is touched.
    """
    if not sys.platform.startswith("linux") or not tensor.numel():
        return
    page = mmap.PAGESIZE
    storage = tensor.untyped_storage()
    # Whole pages within the tensor alone: what lies beside it may be in use.
    start = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _integer(value: Any) -> int | None:
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None
