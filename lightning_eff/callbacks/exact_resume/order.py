"""What stands in a DataLoader's iterator in place of the user's sampler, and in front of its deliveries."""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_eff.callbacks.exact_resume.worker import Carried, RawState, raw_random_state
from lightning_eff.training.random_state import undisturbed


@dataclass
class Pass:
    """One way through the data: what its order was drawn from."""

    created: dict[str, Any]
    """Before the iterator was made, which draws the workers' seed."""
    begun: dict[str, Any]
    """Before the sampler was asked for an iterator."""
    drawn: dict[str, Any] | None = None
    """Before its first index; None until then."""
    epoch: int = 0
    times: int = 0
    """Passes that the epoch has had before: a short loader beside a longer one has several."""
    order: dict[str, Any] | None = None
    """What the order over all ranks is made from, where that is known."""
    seen: int = 0
    """Samples of the epoch that were seen before what is left was dealt anew, and this is a pass through that."""


@dataclass
class Place:
    """Behind one batch, or before the first."""

    tag: int
    """Which of the epoch's batches of all loaders together it was part of."""
    of: Pass
    batches: int = 0
    worker: int = -1
    """Who made the batch."""
    workers: dict[int, tuple[int, Carried]] = field(default_factory=dict)
    """Of each worker the batches that it has made, and the last of its states."""
    own: Any = None
    """State of the sampler, or of a dataset without workers, where it keeps one."""
    generators: dict[str, Any] = field(default_factory=dict)
    """The loader's own."""
    ended: bool = False
    """The sampler has been asked for more, and had no more."""
    before: RawState | None = None
    """This process's generators before the batch was fetched; only where that may happen one batch ahead."""


class Delivers(Protocol):
    """What ``Delivery`` knows of who follows a loader."""

    is_seeded: bool

    @property
    def is_ahead(self) -> bool:
        """Whether a batch is fetched before the one in front of it is trained on."""

    def deliver(self, iterator: Any, data: Any, worker: int | None, before: RawState | None) -> Any:
        """A batch has come."""


class Placed(Delivers, Protocol):
    """What the others know of a ``PlacedLoader``."""

    target: dict[str, Any] | None
    anew: bool

    @property
    def sampler_with_state(self) -> Any:
        """The sampler that keeps its own place, or None."""

    def begin(self, batches: int = 0, of: Pass | None = None) -> Pass:
        """A pass begins."""

    def drawing(self, of: Pass | None = None) -> AbstractContextManager[None]:
        """Around what draws an order: that of a pass, or of the one that begins."""

    def note_drawn(self, of: Pass) -> None:
        """The first index is drawn next."""

    def left(self, of: Pass) -> list[Any]:
        """The batches of a pass through what was dealt anew."""

    def numbered(self, of: Pass, batch: int, indices: Any) -> Any:
        """The indices of a batch, as the dataset is asked for them."""

    def draws(self) -> dict[str, Any]:
        """What an order is drawn from."""

    def set_draws(self, saved: dict[str, Any]) -> None:
        """Set it."""

    def arrive(self, data: Any) -> None:
        """Something has come from a worker."""


class Indices:
    """Stands in front of a loader's sampler of indices while an iterator is made."""

    def __init__(self, sampler: Any, loader: Placed) -> None:
        self.sampler_in_front_of = sampler
        self.loader = loader

    def __iter__(self) -> Order:
        return Order(self.sampler_in_front_of, self.loader)

    def __len__(self) -> int:
        return len(self.sampler_in_front_of)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler_in_front_of":  # not there yet: it is being copied
            raise AttributeError(name)
        return getattr(self.sampler_in_front_of, name)


class Order:
    """Indices, batch for batch."""

    def __init__(self, sampler: Any, loader: Placed) -> None:
        self.loader = loader
        self.keeper = loader.sampler_with_state
        self.states: deque[Any] = deque()
        """Of a sampler that keeps its place: behind each batch that is drawn and not delivered."""
        saved = loader.target
        self.waits = saved is not None
        """Nothing is asked of the workers until it stands where it should."""
        self.first = True
        """No index has been asked for."""
        self.batch = 0
        self.length: int | None = None
        """Of the pass, when it is known."""
        if saved is None:
            with loader.drawing():
                self.of = loader.begin()
                self.indices = iter(sampler)
            return
        self.of = Pass(**saved["pass"])
        if not loader.anew:  # with workers a loader asks twice, and draws their seed in between
            loader.set_draws(self.of.begun)
        loader.anew = False
        loader.begin(saved["batches"], self.of)
        if self.keeper is not None and saved["own"] is not None:
            self.keeper.load_state_dict(saved["own"])
        self.indices = iter(loader.left(self.of) if self.of.seen else sampler)
        if self.keeper is not None and saved.get("ended"):  # asked for more, it would begin its next pass
            self.indices = iter(())

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> Any:
        if self.waits:
            raise StopIteration
        try:
            drawn = self._draw()
        except StopIteration:
            self.length = self.batch
            raise
        if self.keeper is not None:
            self.states.append(self.keeper.state_dict())
        self.batch += 1
        return self.loader.numbered(self.of, self.batch - 1, drawn)

    def _draw(self) -> Any:
        if not self.first:
            return next(self.indices)
        self.first = False
        with self.loader.drawing(self.of):
            if self.of.drawn is None:
                self.loader.note_drawn(self.of)
            return next(self.indices)

    def go_on(self, batches: int) -> None:
        """Skip batches that were seen; nothing of them is loaded."""
        self.waits = False
        if self.of.drawn is not None:
            self.loader.set_draws(self.of.drawn)
        self.batch, self.first = batches, batches == 0
        if self.keeper is None:
            for _ in range(batches):
                next(self.indices, None)


class Delivery:
    """Stands in front of the method of an iterator through which every batch goes."""

    def __init__(self, iterator: weakref.ref[Any], name: str, loader: Delivers) -> None:
        self.iterator = iterator
        self.name = name
        self.loader = loader

    def __call__(self, *args: Any) -> Any:
        """Called by the iterator for each batch."""
        iterator: Any = self.iterator()
        before = raw_random_state() if self.loader.is_ahead and not args else None
        # A dataset that seeds the generators does so here where there are no workers, and the training goes on.
        with undisturbed() if self.loader.is_seeded and not args else nullcontext():
            data = getattr(type(iterator), self.name)(iterator, *args)
        return self.loader.deliver(iterator, data, args[1] if args else None, before)


class Arrival:
    """Stands in front of the method of an iterator that takes what workers send, in the order in which they do."""

    def __init__(self, iterator: weakref.ref[Any], loader: Placed) -> None:
        self.iterator = iterator
        self.loader = loader

    def __call__(self) -> Any:
        """Called by the iterator whenever it waits for its workers."""
        iterator: Any = self.iterator()
        number, data = type(iterator)._get_data(iterator)
        self.loader.arrive(data)
        return number, data


class Held(_BaseDataLoaderIter):
    """Has nothing yet."""

    def __init__(self) -> None:
        pass

    def __next__(self) -> Any:
        raise StopIteration
