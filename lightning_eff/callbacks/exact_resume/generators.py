"""Random generators that are somebody's own: attributes of a sampler, a loader, a dataset or a module."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, Sampler

from lightning_eff.training.random_state import seed_of

_VALIDATION = "validation"
_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Generators:
    """Those of some objects, read and put back by name.

    Looked for in their attributes, and in those of their samplers, loaders and submodules.

    Args:
        owners: objects by name; None has none.

    Example:
        >>> class Cut:
        ...     def __init__(self):
        ...         self.draws = random.Random(0)
        >>> cut = Cut()
        >>> generators = Generators(dataset=cut)
        >>> state, drawn = generators.state(), cut.draws.random()
        >>> generators.set(state)
        >>> list(state), cut.draws.random() == drawn
        (['dataset.draws'], True)
    """

    def __init__(self, **owners: Any) -> None:
        self.found: dict[str, Any] = {}
        seen: set[int] = set()
        for name, owner in owners.items():
            self.found.update(_find(owner, name, seen))

    def state(self) -> dict[str, Any]:
        """By name; what a checkpoint may hold."""
        return {name: _state(generator) for name, generator in self.found.items()}

    def set(self, states: dict[str, Any]) -> None:
        """Set what `state` gave. A generator that is new goes on as it is."""
        for name, generator in self.found.items():
            if name in states:
                _set(generator, states[name])

    def seed(self, seed: int) -> None:
        """Seed each from its name and a number."""
        for name, generator in self.found.items():
            _seed(generator, seed_of(seed, name))


class GeneratorsOfRun:
    """Those of the module, the datamodule and the validation's loaders."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._known = Generators()

    def find(self) -> Generators:
        """Look for them, which takes too long for every batch."""
        owners = {"module": self.trainer.lightning_module, "datamodule": getattr(self.trainer, "datamodule", None)}
        combined = self.trainer.fit_loop.epoch_loop.val_loop._combined_loader
        for index, loader in enumerate(() if combined is None else combined.flattened):
            owners[f"{_VALIDATION}{index}"] = loader
            if not getattr(loader, "num_workers", 0):
                owners[f"{_VALIDATION}{index}.dataset"] = getattr(loader, "dataset", None)
        self._known = Generators(**owners)
        return self._known

    def state(self) -> dict[str, Any]:
        """Of those that were found last."""
        return self._known.state()

    def set(self, states: dict[str, Any]) -> None:
        """Set what `state` gave; the validation's loaders are asked for, where they had been there."""
        val_loop = self.trainer.fit_loop.epoch_loop.val_loop
        if val_loop._combined_loader is None and any(name.startswith(_VALIDATION) for name in states):
            self.trainer.validating = True
            val_loop.setup_data()
            self.trainer.training = True
        self.find().set(states)


def _find(owner: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    attributes = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, nn.Module):
        attributes.update(owner._modules)
    for name, value in attributes.items():
        if isinstance(value, _KINDS) and id(value) not in seen:
            seen.add(id(value))
            yield f"{path}.{name}", value
        elif isinstance(value, Sampler | DataLoader | nn.Module) or name in ("sampler", "_sampler", "batch_sampler"):
            yield from _find(value, f"{path}.{name}", seen)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state))
    else:
        generator.bit_generator.state = _arrays(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits: Any = type(generator.bit_generator)
        generator.bit_generator.state = bits(seed).state
    else:
        generator.seed(seed if isinstance(generator, random.Random) else seed % 2**32)


def _plain(value: Any) -> Any:
    """Arrays as pairs of their type's name and numbers."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(entry) for key, entry in value.items()}
    if isinstance(value, list) and value[:1] == ["array"]:
        return np.array(value[2], dtype=value[1])
    return value
