"""The last states of a run, in host memory or on disk, taken without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.dtensor import local
from lightning_eff.training.snapshots import Place, SnapshotWindow


@dataclass(frozen=True)
class _Leaf:
    """Stands where a tensor was."""

    name: str
    device: torch.device
    sharding: tuple[Any, Any, Any, Any] | None
    """Of a DTensor: mesh, placements, shape, stride."""


@dataclass(frozen=True)
class RunSnapshot:
    """One state: nested dicts and lists as they were given, their tensors apart. Not to be changed."""

    step: int
    tree: Any
    tensors: dict[str, Tensor]

    def host(self, key: str) -> dict[str, Tensor]:
        """The tensors of a flat dict of this rank's parts, as they are kept."""
        return {name: self.tensors[leaf.name] for name, leaf in self.tree[key].items()}

    def rebuild(self, key: str) -> Any:
        """A part of the state, with tensors of its own where the original ones were."""
        return _map(self.tree[key], self._to_device, "", _Leaf)

    def _to_device(self, leaf: _Leaf, _: str) -> Tensor:
        with torch.inference_mode(False):
            tensor = self.tensors[leaf.name].to(leaf.device, copy=True)
            if leaf.sharding is None:
                return tensor
            from torch.distributed.tensor import DTensor

            mesh, placements, shape, stride = leaf.sharding
            return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)


class RunSnapshots:
    """A window of states: nested dicts and lists of tensors and of everything that ``copy.deepcopy`` takes.

    Of a DTensor this rank's part is kept. Copies from a GPU go into pinned memory, queued behind the work that makes
    what they copy; the memory is used again for later states.

    Args:
        length: states that are kept, >= 1.
        place: ``"cpu"``, ``"disk"`` or ``"model"``, see `SnapshotWindow`.

    Example:
        >>> snapshots = RunSnapshots(length=2)
        >>> weight = torch.zeros(2)
        >>> for step in (10, 20, 30):
        ...     weight += 1
        ...     snapshots.take(step, {"model": {"weight": weight}, "rate": {"lr": 0.1}})
        >>> snapshots.steps, snapshots.read(20).rebuild("model")
        ([20, 30], {'weight': tensor([2., 2.])})
    """

    def __init__(self, length: int, place: Place = "cpu") -> None:
        self.window = SnapshotWindow(length, place)
        self._trees: dict[int, Any] = {}

    @property
    def steps(self) -> list[int]:
        """Of the states, oldest first."""
        return self.window.steps

    def take(self, step: int, state: Any) -> None:
        """Keep a state, in place of the oldest one if the window is full."""
        tensors, tree = _taken_apart(state)
        self.window.take(step, tensors)
        self._trees[step] = tree
        self._trees = {step: self._trees[step] for step in self.steps}

    def read(self, step: int) -> RunSnapshot:
        """The state of a step that is kept; waits until it is there."""
        return RunSnapshot(step, self._trees[step], self.window.read()[self.steps.index(step)])

    def bytes_of(self, state: Any) -> int:
        """What one such state takes in the window's place."""
        return self.window.bytes_of(_taken_apart(state)[0])

    def drop_after(self, step: int) -> None:
        """Forget the states that are newer than ``step``."""
        self.window.drop_after(step)
        self._trees = {step: self._trees[step] for step in self.steps}

    def clear(self) -> None:
        """Forget all states, and give the memory back."""
        self.window.clear()
        self._trees = {}


def _taken_apart(state: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a state by name, of DTensors this rank's part, and the tree with leaves in their places."""
    tensors: dict[str, Tensor] = {}
    tree = _map(state, lambda tensor, name: _note(tensor, name, tensors), "", Tensor)
    return tensors, tree


def _note(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> _Leaf:
    sharding = None
    if is_dtensor(tensor):
        sharding = (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    part = local(tensor)
    tensors[name] = part
    return _Leaf(name, part.device, sharding)


def _map(tree: Any, change: Callable[[Any, str], Any], name: str, kind: type) -> Any:
    """The tree with everything of a kind changed, and copies of the rest."""
    if isinstance(tree, kind):
        return change(tree, name)
    if type(tree) is dict:
        return {key: _map(value, change, f"{name}/{key}", kind) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_map(value, change, f"{name}/{i}", kind) for i, value in enumerate(tree))
    return deepcopy(tree)
