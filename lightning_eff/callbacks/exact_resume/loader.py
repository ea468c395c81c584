"""One DataLoader whose place is known, and can be taken up again without loading what came before."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_eff.callbacks.exact_resume.dealing import Hand, note_generator, order_of, samples_of, seen
from lightning_eff.callbacks.exact_resume.generators import Generators
from lightning_eff.callbacks.exact_resume.order import Arrival, Delivery, Held, Indices, Pass, Place
from lightning_eff.callbacks.exact_resume.seeds import SeededDataset, Seeds
from lightning_eff.callbacks.exact_resume.worker import (
    Carried,
    Carrier,
    RawState,
    ResumedDataset,
    WorkerStart,
    keeps_state,
    raw,
    readable,
)
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.random_state import random_state, seeded, set_random_state
from lightning_eff.training.wrapping import Wrapper

_CPU = torch.device("cpu")
_NAMES = {"batch_size": "batch size", "batch_sampler": "batch sampler", "replicas": "ranks"}


class PlacedLoader:
    """Follows a DataLoader's iterators, and makes one that begins at a place.

    The loader stays the user's: only while an iterator is made does it see other samplers and functions.

    Args:
        loader: any DataLoader without a state of its own.
        tag: gives the number of the batch that is being fetched.
        within: whether it is asked within a training batch, where a loader of a ``CombinedLoader`` begins again.
        ahead: whether batches are fetched one ahead: for all loaders, where the length of one is not known.
        seeds: from which the order and each batch are drawn; None: from the generators as they are.
        number: tells loaders that draw from the same seeds apart.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        tag: Callable[[], int],
        within: Callable[[], bool],
        ahead: Callable[[], bool],
        seeds: Seeds | None = None,
        number: int = 0,
    ) -> None:
        self.loader = loader
        self.seeds, self.number = seeds, number
        self.held = False
        """Iterators are empty until `resume`: the state to begin with is not there yet."""
        self._tag, self._within, self._ahead = tag, within, ahead
        self._generators = Generators(loader=loader, dataset=None if loader.num_workers else loader.dataset)
        self.is_seeded = seeds is not None and not isinstance(loader.dataset, IterableDataset)
        self.target: dict[str, Any] | None = None
        self.anew = False
        self._created: dict[str, Any] = {}
        self._workers: dict[int, tuple[int, Carried]] = {}
        self._arrived: dict[int, Carried] = {}
        # A batch may be prefetched, and one in hand: what is saved is the place before both.
        self._places: deque[Place] = deque(maxlen=6)
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
            "ended": place.ended,
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
            "replicas": getattr(loader.sampler, "num_replicas", 1),
        }

    def resume(self, saved: dict[str, Any], device: torch.device) -> Iterator[Any]:
        """An iterator that goes on behind a `fitting` place.

        The generators are left as they are, the loader's own as saved.
        """
        iterator = self.take_up(saved, device)
        return iter(self.loader) if iterator is None or saved["over"] else iterator

    def take_up(self, saved: dict[str, Any], device: torch.device) -> Iterator[Any] | None:
        """Be what the loader was at a `fitting` place, and give the iterator that it had, if anything is left of it."""
        self.held = False
        _shutdown_workers_and_reset_iterator(self.loader)
        if "pass" not in saved:
            self._generators.set(saved.get("generators", {}))
            return None
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
        taken_up: Iterator[Any] = iterator
        return taken_up

    def fitting(self, saved: dict[str, Any], window: int = 0, last: bool = False) -> tuple[dict[str, Any], int | None]:
        """A saved place, as far as this loader can take it up.

        Args:
            saved: what `place` gave.
            window: of its batches how many no optimizer step has used, whose gradients are lost if it deals anew.
            last: they are all that the epoch had, whatever it left out.

        Returns:
            The place; and where the rest of the epoch is dealt anew, of how many batches it is.
        """
        then, now = saved.get("about", {}), self.about()
        changed = {name: (value, now[name]) for name, value in then.items() if value != now[name]}
        workers = changed.pop("workers", None)
        order = saved["pass"].get("order") if "pass" in saved else None
        if order is not None and "seed" in order and isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.seed = order["seed"]  # for the epochs to come
        if changed:
            others = {"batch_size", "replicas"} & changed.keys()
            between = "pass" not in saved or saved["over"] or not saved["batches"] + saved["pass"].get("seen", 0)
            if others and changed.keys() <= {*others, "sampler"}:
                if between:
                    return {"about": now, "generators": saved["generators"]}, None
                if order is not None and order_of(self.loader) is not None:
                    return self._dealt(saved, window, last)
            words = ", ".join(
                f"{_NAMES.get(name, name)} {was!r}, now {here!r}" for name, (was, here) in changed.items()
            )
            raise MisconfigurationException(
                f"ExactResume: the training data are not those of the run that was broken off ({words}), so its place "
                "in them is lost: give it the same, or go on without ExactResume, which begins the epoch's order anew"
            )
        if workers and "pass" in saved:
            if isinstance(self.loader.dataset, IterableDataset):
                raise MisconfigurationException(
                    f"ExactResume: an IterableDataset was read by {workers[0]} workers, and is by {workers[1]} now: "
                    "which of them has seen what cannot be dealt anew. Give it as many as before"
                )
            if not self.is_seeded:
                rank_zero_warn(
                    f"ExactResume: the loader has {workers[1]} workers and had {workers[0]}: the samples and their "
                    "order are the same, but what its workers draw is not, and from here on the run is not equal to "
                    "the bit"
                )
            saved = {**saved, "workers": {}, "worker": -1}
        return saved, None

    def _dealt(self, saved: dict[str, Any], window: int, last: bool) -> tuple[dict[str, Any], int]:
        of, batches = saved["pass"], saved["batches"] - min(window, saved["batches"])
        behind = saved["about"]["samples"] if last else seen(saved["about"], of["seen"], batches)
        now = self.draws()
        rest = {**of, "created": now, "begun": now, "drawn": None, "seen": behind}
        left = Hand(self.loader).batches(saved["about"]["samples"] - behind)
        place = {
            "over": False,
            "batches": 0,
            "ended": False,
            "worker": -1,
            "workers": {},
            "own": None,
            "before_next": None,
        }
        return {**place, "about": self.about(), "generators": saved["generators"], "pass": rest}, left

    # --- iterators ---------------------------------------------------------------------------------------------------

    def _get_iterator(self, inner: Callable[[], Any]) -> Any:
        if self.held:
            return Held()
        loader: Any = self.loader
        saved = self.target
        iterable = isinstance(loader.dataset, IterableDataset)
        self._workers = {}
        if saved is not None:
            self.set_draws(saved["pass"]["created"])
        states = {} if saved is None else self._states(saved)
        index_sampler = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        others: dict[str, Any] = {index_sampler: Indices(getattr(loader, index_sampler), self)}
        if loader.num_workers:
            if not self.is_seeded:
                others["collate_fn"] = Carrier(loader.collate_fn, getattr(loader.batch_sampler, "batch_size", None))
            others["worker_init_fn"] = WorkerStart(loader.worker_init_fn, {} if iterable else states)
        if iterable and states:
            samples = 1 if loader.batch_sampler is None else loader.batch_sampler.batch_size
            others["dataset"] = ResumedDataset(loader.dataset, states, samples)
        elif self.is_seeded:
            others["dataset"] = SeededDataset(loader.dataset)
        with with_attributes(loader, others), nullcontext() if saved else self.drawing():
            self._created = self.draws()
            iterator = inner()
        # Not a Wrapper: the iterator would refer to itself, and its workers end when nobody refers to it.
        name = "_process_data" if loader.num_workers else "_next_data"
        setattr(iterator, name, Delivery(weakref.ref(iterator), name, self))
        if loader.num_workers and loader.persistent_workers:
            iterator._get_data = Arrival(weakref.ref(iterator), self)
        return iterator

    def _states(self, saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
        if self.loader.num_workers:
            self._workers = {
                worker: (
                    state["batches"],
                    Carried(None, raw(state["random"]), state["dataset"], state["generators"], state["ended"]),
                )
                for worker, state in saved["workers"].items()
            }
            return dict(saved["workers"])
        own = saved["own"] if self._dataset_keeps_state and saved["own"] else {"dataset": None, "ended": False}
        return {0: {"batches": saved["batches"], **own}} if saved["batches"] else {}

    def begin(self, batches: int = 0, of: Pass | None = None) -> Pass:
        """A pass through the order begins."""
        if of is None:
            epoch, times = self._coming()
            of = Pass(self._created, self.draws(), epoch=epoch, times=times, order=order_of(self.loader))
        tag = self._tag() if self._within() else -1
        worker, own = -1, None
        if self.target is not None:
            worker, own = self.target["worker"], self.target["own"]
        else:  # workers that stay have seen nothing of this pass
            self._workers = {number: (0, last) for number, (_, last) in self._workers.items()}
        self._places.append(Place(tag, of, batches, worker, dict(self._workers), own, self._generators.state()))
        return of

    def deliver(self, iterator: Any, data: Any, worker: int | None, before: RawState | None) -> Any:
        """Note a batch, and give it as the loader would."""
        last = self._places[-1]
        place = Place(self._tag(), last.of, last.batches + 1, before=before)
        if worker is not None:
            place.worker = worker
            if not self.is_seeded:
                self._workers[worker] = (self._workers[worker][0] + 1 if worker in self._workers else 1, data)
                carried, data = data, data.batch
                carried.batch = None  # its random states are kept, and the batch need not be
        elif self._dataset_keeps_state:
            dataset: Any = self.loader.dataset
            place.own = {"dataset": dataset.state_dict(), "ended": iterator._dataset_fetcher.ended}
        if iterator._sampler_iter.states:
            place.own = iterator._sampler_iter.states.popleft()
        place.workers, place.generators = dict(self._workers), self._generators.state()
        place.ended = iterator._sampler_iter.length == place.batches
        self._places.append(place)
        return data

    def arrive(self, data: Any) -> None:
        """Of workers that stay: what they fetched ahead is dropped when the next pass begins, and has moved them on."""
        if isinstance(data, Carried):
            self._arrived[data.worker] = data
        elif data is None:  # a worker has come to the pass that begins
            for worker, last in self._arrived.items():
                last.batch = None
                self._workers[worker] = (0, last)
            self._places[-1].workers = dict(self._workers)

    @property
    def is_ahead(self) -> bool:
        """As `Delivery` asks."""
        return self._ahead()

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

    def note_drawn(self, of: Pass) -> None:
        """The first index of a pass is drawn next."""
        of.drawn = self.draws()
        if not of.seen:  # else the order is an older one
            note_generator(of.order, self.loader.sampler)

    def drawing(self, of: Pass | None = None) -> AbstractContextManager[None]:
        """Around what draws an order: that of a pass, or of the one that begins."""
        if self.seeds is None:
            return nullcontext()
        epoch, times = self._coming() if of is None else (of.epoch, of.times)
        return seeded(self.seeds.of_order(self.number, epoch, times))

    def _coming(self) -> tuple[int, int]:
        """Of the pass that begins: its epoch, and how many that has had."""
        if self.seeds is None:
            return 0, 0
        return self.seeds.epoch(), self._places[-1].of.times + 1 if self._within() and self._places else 0

    def numbered(self, of: Pass, batch: int, indices: Any) -> Any:
        """The indices of a batch, as the dataset is asked for them."""
        if self.seeds is None or not self.is_seeded:
            return indices
        rank = getattr(self.loader.sampler, "rank", self.seeds.rank)  # ranks that share a model load the same
        return self.seeds.of_samples(self.number, of.epoch, of.times, of.seen, batch, rank), indices

    def left(self, of: Pass) -> list[Any]:
        """The batches of a pass through what was dealt anew."""
        assert of.order is not None
        data: Any = self.loader.dataset
        return Hand(self.loader).deal(samples_of(of.order, len(data))[of.seen :])


@contextmanager
def with_attributes(loader: Any, others: dict[str, Any]) -> Iterator[None]:
    """Let a loader have other attributes, which it refuses to have changed."""
    before = {name: loader.__dict__[name] for name in others}
    try:
        for name, value in others.items():
            object.__setattr__(loader, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(loader, name, value)
