"""Averaged weights as files beside a Lightning checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor, nn

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.merging.safe_files import safetensors_bytes, save_safetensors
from lightning_eff.training.dtensor import full, reshard
from lightning_eff.training.rank_state import KEY as _RANK_STATE

KEY = "lightning_eff_average"  # in the averaged checkpoint: what it is the average of

# Of a checkpoint that training goes on from; an average is no such thing.
_TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", _RANK_STATE)


def averaged_paths(checkpoint: str, name: str) -> tuple[str, str]:
    """``folder/last.ckpt`` -> ``folder/<name>-last.safetensors`` and ``folder/<name>-last.ckpt``.

    The name comes first, because Lightning takes what begins with "last" for a checkpoint to resume from.
    """
    folder, file = os.path.split(checkpoint.rstrip("/"))
    stem = f"{name}-{file.removesuffix('.ckpt')}"
    return os.path.join(folder, f"{stem}.safetensors"), os.path.join(folder, f"{stem}.ckpt")


def averaged_state(module: nn.Module, averages: Mapping[int, Tensor], keep: bool) -> dict[str, Tensor]:
    """The module's ``state_dict`` with averages in place of its tensors, whole and on the CPU.

    Collective under FSDP2.

    Args:
        module: whose state this is.
        averages: ``id`` of a parameter or buffer -> this rank's part of its average; under all names of a tied one.
        keep: whether this rank needs it; the others help to put shards together and get nothing.
    """
    reshard(module)
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in done:
            average = averages.get(id(tensor))
            if average is not None:
                whole = full(average, tensor)
            else:
                whole = tensor.detach()
                whole = whole.full_tensor() if is_dtensor(whole) else whole  # type: ignore[attr-defined]
            done[id(tensor)] = whole.cpu() if keep else whole.new_empty(0)
        state[name] = done[id(tensor)]
    return state if keep else {}


def write_averaged(
    checkpoint: Mapping[str, Any], state: dict[str, Tensor], paths: tuple[str | None, str | None], about: dict[str, Any]
) -> None:
    """Write the safetensors file and the Lightning checkpoint; each appears only when it is complete.

    Args:
        checkpoint: the one that they lie beside: its hyperparameters, epoch and step, and which tensors it has, for a
            module may leave some out.
        state: the averaged weights.
        paths: of the safetensors file and of the checkpoint, None for none.
        about: what the average is; plain Python values.
    """
    named = checkpoint.get("state_dict") or {}
    if any(name in state for name in named):
        state = {name: tensor for name, tensor in state.items() if name in named}
    for path, write in zip(paths, (_write_safetensors, _write_checkpoint), strict=True):
        if path is None:
            continue
        fs = get_filesystem(path)
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            write(f"{path}.part", checkpoint, state, about)
            fs.mv(f"{path}.part", path)
        except BaseException:
            with suppress(FileNotFoundError):
                fs.rm_file(f"{path}.part")
            raise


def _write_safetensors(path: str, checkpoint: Mapping[str, Any], state: dict[str, Tensor], about: Any) -> None:
    metadata = {key: str(value) for key, value in about.items()}
    fs, place = url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        save_safetensors(place, state, metadata)
        return
    with fs.open(place, "wb") as stream:
        stream.write(safetensors_bytes(state, metadata))


def _write_checkpoint(path: str, checkpoint: Mapping[str, Any], state: dict[str, Tensor], about: Any) -> None:
    rest = {key: value for key, value in checkpoint.items() if key not in _TRAINING}
    with get_filesystem(path).open(path, "wb") as stream:
        torch.save({**rest, "state_dict": state, KEY: about}, stream)


def remove_averaged(checkpoint: str, name: str) -> None:
    """Remove the files beside a checkpoint, where there are any."""
    for path in averaged_paths(checkpoint, name):
        with suppress(FileNotFoundError):
            get_filesystem(path).rm_file(path)
