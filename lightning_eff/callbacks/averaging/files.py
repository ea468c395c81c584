"""Averaged weights as files beside a Lightning checkpoint."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from itertools import chain
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from safetensors import safe_open
from torch import Tensor, nn

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.merging.safe_files import safetensors_bytes, save_safetensors
from lightning_eff.training.dtensor import full, reshard
from lightning_eff.training.later_files import Save
from lightning_eff.training.rank_state import KEY as _RANK_STATE
from lightning_eff.training.whole_files import whole_file

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


def own_state(module: nn.Module) -> dict[str, Any]:
    """The module's ``state_dict``, its tensors themselves as far as it does not make copies of them."""
    try:
        inspect.signature(module.state_dict).bind(keep_vars=True)
    except TypeError:  # its own `state_dict` has not the arguments of torch's
        return module.state_dict()
    return module.state_dict(keep_vars=True)


def averaged_state(
    module: nn.Module,
    averages: Mapping[int, Tensor],
    in_place: Callable[[], AbstractContextManager[None]],
    keep: bool,
) -> dict[str, Tensor]:
    """The module's ``state_dict`` with averages in place of its tensors, whole and on the CPU.

    Collective under FSDP2.

    Args:
        module: whose state this is.
        averages: ``id`` of a parameter or buffer -> this rank's part of its average; under all names of a tied one.
        in_place: puts the averages in the weights' place. Needed where the ``state_dict`` has copies, which a module's
            own method or a hook may make to cast or to rename; then those of the averages are made in the same way.
        keep: whether this rank needs it; the others help to put shards together and get nothing.
    """
    reshard(module)
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    tensors = {name: tensor for name, tensor in own_state(module).items() if isinstance(tensor, Tensor)}
    own = {id(tensor) for tensor in chain(module.parameters(), module.buffers())}
    copies = {name for name, tensor in tensors.items() if id(tensor) not in own}
    made: dict[str, Tensor] = {}
    if copies and not averages.keys() <= {id(tensor) for tensor in tensors.values()}:  # else they are of something else
        with in_place():
            made = {
                name: _whole(tensor, keep, copy=True) for name, tensor in module.state_dict().items() if name in copies
            }
    for name, tensor in tensors.items():
        if name in made:
            state[name] = made[name]
            continue
        if id(tensor) not in done:
            average = averages.get(id(tensor))
            done[id(tensor)] = _whole(tensor if average is None else full(average, tensor), keep)
        state[name] = done[id(tensor)]
    return state if keep else {}


def _whole(tensor: Tensor, keep: bool, copy: bool = False) -> Tensor:
    whole = tensor.detach()
    whole = whole.full_tensor() if is_dtensor(whole) else whole  # type: ignore[attr-defined]
    return whole.to("cpu", copy=copy) if keep else whole.new_empty(0)


def as_saved(saved: Mapping[str, Any], module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averaged weights as the module saves its own: ``on_save_checkpoint`` may leave some out, or rename them.

    Args:
        saved: the checkpoint's ``state_dict``, of the module's own tensors.
        module: whose they are.
        state: the averaged ones, by the names of the module's ``state_dict``.

    Returns:
        Those that the checkpoint has, under its names; all, if it has none that can be recognised.
    """
    own = own_state(module)
    by_place = {_place(own[name]): tensor for name, tensor in state.items()}
    kept = {
        name: state[name] if name in state else by_place[_place(tensor)]
        for name, tensor in saved.items()
        if isinstance(tensor, Tensor) and (name in state or _place(tensor) in by_place)
    }
    return kept or state


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.device


def without_training(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run: hyperparameters, epoch and step."""
    return {key: value for key, value in checkpoint.items() if key not in (*_TRAINING, "state_dict")}


def write_averaged(
    run: Mapping[str, Any],
    state: dict[str, Tensor],
    paths: tuple[str | None, str | None],
    about: dict[str, Any],
    save: Save = torch.save,
) -> None:
    """Write the safetensors file and the Lightning checkpoint; each appears only when it is complete.

    Args:
        run: the checkpoint that they lie beside, ``without_training``.
        state: the averaged weights.
        paths: of the safetensors file and of the checkpoint, None for none.
        about: what the average is; plain Python values.
        save: writes an object to a stream as ``torch.save``.
    """
    safe, lightning = paths
    if safe is not None:
        with whole_file(safe) as part:
            _write_safetensors(part, state, about)
    if lightning is not None:
        with whole_file(lightning) as part, get_filesystem(part).open(part, "wb") as stream:
            save({**run, "state_dict": state, KEY: about}, stream)


def _write_safetensors(path: str, state: dict[str, Tensor], about: Any) -> None:
    metadata = {key: str(value) for key, value in about.items()}
    fs, place = url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        save_safetensors(place, state, metadata)
        return
    with fs.open(place, "wb") as stream:
        stream.write(safetensors_bytes(state, metadata))


def read_averaged(checkpoint: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`write_averaged` has written beside a checkpoint, or the one that it links to: tensors, and about."""
    places = [checkpoint, *([os.path.realpath(checkpoint)] if os.path.lexists(checkpoint) else [])]
    for safe, lightning in (averaged_paths(place, name) for place in places):
        with suppress(Exception):  # whatever is wrong with a file, the run can go on without it
            if get_filesystem(lightning).exists(lightning):
                with get_filesystem(lightning).open(lightning, "rb") as stream:
                    saved = torch.load(stream, map_location="cpu", weights_only=True)
                return saved["state_dict"], saved[KEY]
            with safe_open(safe, framework="pt") as file:
                about = {key: _value(text) for key, text in (file.metadata() or {}).items()}
                return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118  (it is no dict)
    return None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def link_averaged(checkpoint: str, link: str, name: str) -> None:
    """Link to the files beside a checkpoint by those beside a link to it, as far as there are any."""
    for target, path in zip(averaged_paths(checkpoint, name), averaged_paths(link, name), strict=True):
        if os.path.lexists(path):
            os.remove(path)
        if os.path.exists(target):
            try:
                os.symlink(os.path.relpath(target, os.path.dirname(path)), path)
            except OSError:  # on Windows a link takes a permission; Lightning copies there as well
                shutil.copy(target, path)


def remove_averaged(checkpoint: str, name: str) -> None:
    """Remove the files beside a checkpoint, where there are any."""
    for path in averaged_paths(checkpoint, name):
        with suppress(FileNotFoundError):
            get_filesystem(path).rm_file(path)
