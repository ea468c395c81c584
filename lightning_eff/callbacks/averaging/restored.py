"""What was saved by other ranks, or as the average itself, in the form in which this rank keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_eff.callbacks.averaging.files import own_state
from lightning_eff.callbacks.averaging.trained_tensors import TrainedTensors
from lightning_eff.training.dtensor import part


def in_parts(state: Any, originals: Mapping[str, Tensor]) -> Any:
    """A state in which whole tensors are this rank's part, where the model's tensor of that name is sharded now."""
    if isinstance(state, list):
        return [in_parts(entry, originals) for entry in state]
    if not isinstance(state, dict):
        return state
    return {
        name: part(value, originals[name])
        if isinstance(value, Tensor) and name in originals and value.shape == originals[name].shape
        else in_parts(value, originals)
        for name, value in state.items()
    }


def of_files(
    averaged: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    module: LightningModule,
    tensors: TrainedTensors,
    every: Mapping[str, Tensor],
) -> tuple[list[dict[str, Tensor]], list[Mapping[str, Any]]]:
    """This rank's part of averages that were read from their files.

    Args:
        averaged: the ``state_dict`` of each file, and what it says of its average.
        module: whose averages they are.
        tensors: knows which of its tensors are averaged.
        every: this rank's part of each tensor of the module.

    Returns:
        By clean name the averages of all tensors that are trained or have been, that is differ from their average;
        and what each file says.
    """
    originals = tensors.originals(module)
    own_keys = {id(tensor): key for key, tensor in own_state(module).items()}
    keys = {name: own_keys.get(id(own), name) for name, own in originals.items()}  # of a copy it is the name at best
    parts: list[dict[str, Tensor]] = []
    for state, _ in averaged:
        named = {name: state[key] for name, key in keys.items() if key in state}
        own_parts = {name: part(whole, originals[name]) for name, whole in named.items() if name in every}
        parts.append({name: mean.to(every[name].device) for name, mean in own_parts.items()})
    trained = {
        name
        for name, mean in parts[0].items()
        if originals[name].requires_grad or not torch.equal(mean.to(every[name].dtype), every[name])
    }
    return [{name: mean for name, mean in one.items() if name in trained} for one in parts], [a for _, a in averaged]
