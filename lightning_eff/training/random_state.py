"""The state of the process's random number generators, and others that follow from it."""

from __future__ import annotations

import hashlib
import random
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
