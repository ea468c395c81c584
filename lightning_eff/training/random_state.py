"""The state of the process's random number generators, and others that follow from it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Of torch, of ``device`` if it is a GPU, of ``random`` and of NumPy: tensors and plain values. Does not wait."""
    state = {"torch": torch.get_rng_state(), **host_random_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what `random_state` gave, perhaps in another process."""
    torch.set_rng_state(state["torch"])
    set_host_random_state(state)
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def host_random_state() -> dict[str, Any]:
    """Of ``random`` and of NumPy alone."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), *rest]}


def set_host_random_state(state: dict[str, Any]) -> None:
    """Set what `host_random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits from what it is for, such as ``(seed, epoch, shard, index)``; the same on every machine.

    Example:
        >>> seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(0, 12)
        True
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_host(seed: int) -> None:
    """Seed torch's, Python's and NumPy's generators of the CPU."""
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs as well
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the CPU; they go on afterwards as if nothing had been drawn."""
    with undisturbed():
        seed_host(seed)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is drawn from the generators of the CPU, or seeded, leaves them as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def draw_anew(state: dict[str, Any], number: int, device: torch.device) -> None:
    """Seed each generator from its state in ``state`` and a number.

    The same state and number always give the same numbers: ranks whose generators were equal draw alike, and those
    whose were not do not.

    Example:
        >>> state = random_state(torch.device("cpu"))
        >>> def draw(number):
        ...     draw_anew(state, number, torch.device("cpu"))
        ...     return torch.rand(3).tolist()
        >>> draw(1) == draw(1), draw(1) == draw(2)
        (True, False)
    """
    name, keys, *rest = state["numpy"]
    torch.default_generator.manual_seed(_seed(state["torch"].numpy().tobytes(), number))  # of the CPU alone
    random.seed(_seed(repr(state["python"]).encode(), number))
    np.random.seed(_seed(repr((name, keys.tolist(), rest)).encode(), number) % 2**32)
    if "cuda" in state and device.type == "cuda":
        generator = torch.Generator(device).manual_seed(_seed(state["cuda"].numpy().tobytes(), number))
        torch.cuda.set_rng_state(generator.get_state(), device)


def _seed(state: bytes, number: int) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.sha256(state + number.to_bytes(8, "big")).digest()[:8], "big") >> 1
