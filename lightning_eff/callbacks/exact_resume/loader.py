"""One DataLoader whose place is known, and can be taken up again without loading what came before."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from torch.utils.data import DataLoader, IterableDataset

from lightning_eff.callbacks.exact_resume.generators import Generators
from lightning_eff.callbacks.exact_resume.order import Delivery, Held, Indices, Pass
from lightning_eff.callbacks.exact_resume.worker import (
    Carried,
    Carrier,
    RawState,
    ResumedDataset,
    WorkerStart,
    keeps_state,
    readable,
)
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.random_state import random_state, set_random_state
from lightning_eff.training.wrapping import Wrapper

_CPU = torch.device("cpu")
_NAMES = {"samples": "samples", "batch_size": "batch size", "sampler": "sampler", "batch_sampler": "batch sampler"}


@dataclass
class _Place:
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
    before: RawState | None = None
    """This process's generators before the batch was fetched; only where that may happen one batch ahead."""


class PlacedLoader:
    """Follows a DataLoader's iterators, and makes one that begins at a place.

    The loader stays the user's: only while an iterator is made does it see other samplers and functions.

    Args:
        loader: any DataLoader without a state of its own.
        tag: gives the number of the batch that is being fetched.
        within: whether it is asked within a training batch, where a loader of a ``CombinedLoader`` begins again.
    """

    def __init__(self, loader: DataLoader[Any], tag: Callable[[], int], within: Callable[[], bool]) -> None:
        self.loader = loader
        self.held = False
        """Iterators are empty until `resume`: the state to begin with is not there yet."""
        self._tag, self._within = tag, within
        self._generators = Generators(loader=loader, dataset=None if loader.num_workers else loader.dataset)
        self.is_ahead = sized_len(loader) is None
        self.target: dict[str, Any] | None = None
        self.anew = False
        self._created: dict[str, Any] = {}
        self._workers: dict[int, tuple[int, Carried]] = {}
        # A batch may be prefetched, and one in hand: what is saved is the place before both.
        self._places: deque[_Place] = deque(maxlen=6)
        self._wrapper = Wrapper(loader, "_get_iterator", self._get_iterator)

    def detach(self) -> None:
        """Leave the loader as it was."""
        self._wrapper.remove()

    # --- the place ---------------------------------------------------------------------------------------------------

    def place(self, batches: int | None) -> dict[str, Any]:
        """Where it stood when so many of the epoch's batches (of all loaders together) were behind.

        Args:
            batches: None: between two epochs, where the next pass has not begun; workers that stay go on, though.
        """
        place, after = None, None
        stay = bool(self.loader.num_workers) and self.loader.persistent_workers
        if batches is not None or stay:  # else nothing of a pass is left when it is over
            for place in reversed(self._places):
                if batches is None or place.tag < batches:
                    break
                place, after = None, place
        if place is None:
            return {"about": self.about(), "generators": self._generators.state()}
        workers = {
            worker: {
                "batches": count,
                "random": readable(last.random),
                "dataset": last.dataset,
                "generators": last.generators,
                "ended": last.ended,
            }
            for worker, (count, last) in place.workers.items()
        }
        return {
            "about": self.about(),
            "generators": self._generators.state() if after is None else place.generators,
            "over": batches is None,
            "pass": vars(place.of),
            "batches": place.batches,
            "worker": place.worker,
            "workers": workers,
            "own": place.own,
            "before_next": None if after is None or after.before is None else readable(after.before),
        }

    def about(self) -> dict[str, Any]:
        """What must be the same in the run that resumes."""
        loader: Any = self.loader
        iterable = isinstance(loader.dataset, IterableDataset)
        return {
            "samples": None if iterable or not hasattr(loader.dataset, "__len__") else len(loader.dataset),
            "batch_size": getattr(loader.batch_sampler, "batch_size", loader.batch_size),
            "sampler": type(getattr(loader.batch_sampler, "sampler", loader.sampler)).__name__,
            "batch_sampler": type(loader.batch_sampler).__name__,
            "workers": loader.num_workers,
        }

    def resume(self, saved: dict[str, Any], device: torch.device) -> Iterator[Any]:
        """An iterator that goes on behind a place. The generators are left as they are, the loader's own as saved."""
        self.held = False
        _shutdown_workers_and_reset_iterator(self.loader)
        saved = self._fitting(saved)
        if "pass" not in saved:
            self._generators.set(saved.get("generators", {}))
            return iter(self.loader)
        now = random_state(device)
        self.target, self.anew = saved, True
        iterator: Any = iter(self.loader)
        self.target = None
        iterator._sampler_iter.go_on(saved["batches"])
        if self.loader.num_workers:
            # The next batch is the turn of the worker behind the last one's.
            order = [(saved["worker"] + 1 + n) % self.loader.num_workers for n in range(self.loader.num_workers)]
            iterator._worker_queue_idx_cycle = itertools.cycle(order)
            for _ in range(iterator._prefetch_factor * self.loader.num_workers):
                iterator._try_put_index()
        self._generators.set(saved["generators"])
        set_random_state(now, device)
        return iter(self.loader) if saved["over"] else iterator

    def _fitting(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved place, as far as this loader can take it up."""
        then, now = saved.get("about", {}), self.about()
        changed = {name: (value, now[name]) for name, value in then.items() if value != now[name]}
        workers = changed.pop("workers", None)
        if changed:
            words = ", ".join(f"{_NAMES[name]} {was!r}, now {here!r}" for name, (was, here) in changed.items())
            raise MisconfigurationException(
                f"ExactResume: the training data are not those of the run that was broken off ({words}), so its place "
                "in them is lost: give it the same, or go on without ExactResume, which begins the epoch's order anew"
            )
        if workers and "pass" in saved:
            iterable = isinstance(self.loader.dataset, IterableDataset)
            if iterable:
                raise MisconfigurationException(
                    f"ExactResume: an IterableDataset was read by {workers[0]} workers, and is by {workers[1]} now: "
                    "which of them has seen what cannot be dealt anew. Give it as many as before"
                )
            rank_zero_warn(
                f"ExactResume: the loader has {workers[1]} workers and had {workers[0]}: the samples and their order "
                "are the same, but what its workers draw is not, and from here on the run is not equal to the bit"
            )
            return {**saved, "workers": {}, "worker": -1}
        return saved

    # --- iterators ---------------------------------------------------------------------------------------------------

    def _get_iterator(self, inner: Callable[[], Any]) -> Any:
        if self.held:
            return Held()
        loader: Any = self.loader
        saved = self.target
        iterable = isinstance(loader.dataset, IterableDataset)
        self._workers = {}
        if saved is None:
            self._created = self.draws()
        else:
            self._created = saved["pass"]["created"]
            self.set_draws(self._created)
        states = {} if saved is None else self._states(saved)
        index_sampler = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        others: dict[str, Any] = {index_sampler: Indices(getattr(loader, index_sampler), self)}
        if loader.num_workers:
            others["collate_fn"] = Carrier(loader.collate_fn, getattr(loader.batch_sampler, "batch_size", None))
            others["worker_init_fn"] = WorkerStart(loader.worker_init_fn, {} if iterable else states)
        if iterable and states:
            samples = 1 if loader.batch_sampler is None else loader.batch_sampler.batch_size
            others["dataset"] = ResumedDataset(loader.dataset, states, samples)
        with _with(loader, others):
            iterator = inner()
        # Not a Wrapper: the iterator would refer to itself, and its workers end when nobody refers to it.
        name = "_process_data" if loader.num_workers else "_next_data"
        setattr(iterator, name, Delivery(weakref.ref(iterator), name, self))
        return iterator

    def _states(self, saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
        if self.loader.num_workers:
            self._workers = {
                worker: (
                    state["batches"],
                    Carried(None, _raw(state["random"]), state["dataset"], state["generators"], state["ended"]),
                )
                for worker, state in saved["workers"].items()
            }
            return dict(saved["workers"])
        own = saved["own"] if self._dataset_keeps_state and saved["own"] else {"dataset": None, "ended": False}
        return {0: {"batches": saved["batches"], **own}} if saved["batches"] else {}

    def begin(self, batches: int = 0, of: Pass | None = None) -> Pass:
        """A pass through the order begins."""
        of = of or Pass(self._created, self.draws())
        tag = self._tag() if self._within() else -1
        worker, own = -1, None
        if self.target is not None:
            worker, own = self.target["worker"], self.target["own"]
        else:  # workers that stay have seen nothing of this pass
            self._workers = {number: (0, last) for number, (_, last) in self._workers.items()}
        self._places.append(_Place(tag, of, batches, worker, dict(self._workers), own, self._generators.state()))
        return of

    def deliver(self, iterator: Any, data: Any, worker: int | None, before: RawState | None) -> Any:
        """Note a batch, and give it as the loader would."""
        last = self._places[-1]
        place = _Place(self._tag(), last.of, last.batches + 1, before=before)
        if worker is not None:
            place.worker = worker
            self._workers[worker] = (self._workers[worker][0] + 1 if worker in self._workers else 1, data)
            data, data.batch = data.batch, None
        elif self._dataset_keeps_state:
            dataset: Any = self.loader.dataset
            place.own = {"dataset": dataset.state_dict(), "ended": iterator._dataset_fetcher.ended}
        if iterator._sampler_iter.states:
            place.own = iterator._sampler_iter.states.popleft()
        place.workers, place.generators = dict(self._workers), self._generators.state()
        self._places.append(place)
        return data

    @property
    def _dataset_keeps_state(self) -> bool:
        return isinstance(self.loader.dataset, IterableDataset) and keeps_state(self.loader.dataset)

    @property
    def sampler_with_state(self) -> Any:
        """The batch sampler, or the sampler, that keeps its own place; or None."""
        batches: Any = self.loader.batch_sampler
        samplers = (batches, getattr(batches, "sampler", None), self.loader.sampler)
        return next((sampler for sampler in samplers if keeps_state(sampler)), None)

    # --- what an order is drawn from ---------------------------------------------------------------------------------

    def draws(self) -> dict[str, Any]:
        """What an order is drawn from, now."""
        return {"random": random_state(_CPU), "generators": self._generators.state()}

    def set_draws(self, saved: dict[str, Any]) -> None:
        """Set it."""
        set_random_state(saved["random"], _CPU)
        self._generators.set(saved["generators"])


@contextmanager
def _with(loader: Any, others: dict[str, Any]) -> Iterator[None]:
    """Let a loader have other attributes, which it refuses to have changed."""
    before = {name: loader.__dict__[name] for name in others}
    try:
        for name, value in others.items():
            object.__setattr__(loader, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(loader, name, value)


def _raw(state: dict[str, Any]) -> Any:
    """The other way round than ``readable``."""
    name, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    return (
        state["torch"].numpy().tobytes(),
        (version, tuple(internal), gauss),
        (name, keys.numpy().astype("uint32"), *rest),
    )
