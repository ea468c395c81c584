"""What a loader's workers keep to themselves: sent along with each batch, and given to the workers that go on."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_eff.callbacks.exact_resume.generators import Generators
from lightning_eff.callbacks.exact_resume.seeds import SeededDataset
from lightning_eff.training.random_state import set_random_state

RawState = tuple[Any, Any, Any]


class _NumPy:
    """NumPy's global generator, of which most runs draw nothing while they train.

    NumPy takes 40 us to build its state, number by number, so the last one is given again while the generator's memory
    is what it was. A second normal number, kept from the draw of a pair, stands elsewhere: with one at hand the state
    is always built. (Not seen: a state with one is put back, and it was read without one in between.)
    """

    _SIZE = 625 * 4  # MT19937's: 624 numbers of 32 bits, and the place among them

    def __init__(self) -> None:
        self._memory: tuple[int, bytes] | None = None
        self._state: Any = None

    def state(self) -> Any:
        """As `numpy.random.get_state` gives it; not to be written into."""
        generator: Any = np.random.get_bit_generator() if hasattr(np.random, "get_bit_generator") else None
        if not isinstance(generator, np.random.MT19937):
            return np.random.get_state()
        address = generator.ctypes.state_address
        memory = address, ctypes.string_at(address, self._SIZE)
        if memory != self._memory:
            state = np.random.get_state()
            _, _, _, second_at_hand, _ = state
            self._memory, self._state = (None if second_at_hand else memory), state
        return self._state


_numpy = _NumPy()


def raw_random_state() -> RawState:
    """The generators of this process on the CPU, in the form that is quickest to take."""
    return torch.get_rng_state(), random.getstate(), _numpy.state()


def readable(raw: RawState) -> dict[str, Any]:
    """As ``random_state`` gives it: what a checkpoint may hold."""
    name, keys, *rest = raw[2]
    numpy = [str(name), torch.from_numpy(keys.astype(np.int64)), *rest]
    state = raw[0] if isinstance(raw[0], Tensor) else torch.frombuffer(bytearray(raw[0]), dtype=torch.uint8)
    return {"torch": state, "python": raw[1], "numpy": numpy}


def raw(state: dict[str, Any]) -> Any:
    """The other way round."""
    name, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    return (
        state["torch"].numpy().tobytes(),
        (version, tuple(internal), gauss),
        (name, keys.numpy().astype("uint32"), *rest),
    )


@dataclass
class Carried:
    """A batch, and the state of the worker that made it, as of behind it."""

    batch: Any
    random: RawState
    dataset: Any
    """The state of the dataset, where it has one of its own."""
    generators: dict[str, Any]
    """Of the generators that are the dataset's own."""
    ended: bool = False
    """The dataset has no more for this worker, in this pass."""
    worker: int = -1
    """Which one."""

    def pin_memory(self, device: Any = None) -> Carried:
        """The loader's pinning thread asks for it."""
        self.batch = pin_memory(self.batch, device)  # type: ignore[no-untyped-call]
        return self


class Carrier:
    """Stands in front of ``collate_fn``, which a worker calls once for each batch, behind the samples."""

    def __init__(self, collate: Callable[[Any], Any], size: int | None) -> None:
        self.collate = collate
        self.size = size or 0
        self._generators: Generators | None = None

    def __call__(self, samples: Any) -> Carried:
        """Make a batch."""
        batch = self.collate(samples)
        information: Any = get_worker_info()  # type: ignore[no-untyped-call]
        dataset = information.dataset
        if self._generators is None:
            self._generators = Generators(dataset=dataset)
        own = dataset.state_dict() if keeps_state(dataset) else None
        ended = isinstance(samples, list) and len(samples) < self.size
        state, *others = raw_random_state()
        # A tensor would take a file descriptor on its way.
        sent: Any = (state.numpy().tobytes(), *others)
        return Carried(batch, sent, own, self._generators.state(), ended, information.id)


class WorkerStart:
    """Stands in front of ``worker_init_fn``: behind it the worker is what the one before it was."""

    def __init__(self, function: Callable[[int], None] | None, states: dict[int, dict[str, Any]]) -> None:
        self.function = function
        self.states = states

    def __call__(self, worker: int) -> None:
        """Called in a worker when it starts."""
        information: Any = get_worker_info()  # type: ignore[no-untyped-call]
        if isinstance(information.dataset, ResumedDataset | SeededDataset):
            object.__setattr__(information, "dataset", information.dataset.dataset)  # it refuses a plain assignment
        if self.function is not None:
            self.function(worker)
        if worker in self.states:
            set_random_state(self.states[worker]["random"], torch.device("cpu"))
            Generators(dataset=information.dataset).set(self.states[worker]["generators"])


class ResumedDataset(IterableDataset[Any]):
    """An IterableDataset that begins behind what was seen already, once.

    Args:
        dataset: the user's.
        states: of each worker (the process itself is worker 0 where there are none), with what it has seen.
        samples: of a batch.
    """

    def __init__(self, dataset: Any, states: dict[int, dict[str, Any]], samples: int) -> None:
        self.dataset = dataset
        self.states = states
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        information: Any = get_worker_info()  # type: ignore[no-untyped-call]
        state = self.states.pop(0 if information is None else information.id, None)
        items: Iterator[Any]
        if state is None:  # a later epoch, or a worker that has not begun
            items = iter(self.dataset)
            return items
        if state["dataset"] is not None and state["batches"]:
            self.dataset.load_state_dict(state["dataset"])
            # One that has come to its end may be at its beginning again.
            items = iter(()) if state["ended"] else iter(self.dataset)
        else:
            items = iter(self.dataset)
            for _ in range(state["batches"] * self.samples):
                next(items, None)
        if information is not None:
            set_random_state(state["random"], torch.device("cpu"))
            Generators(dataset=self.dataset).set(state["generators"])
        return items


def keeps_state(thing: Any) -> bool:
    """Whether a dataset, a sampler or a loader keeps its own place."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))
