"""All training loaders of a fit: their places when a checkpoint is saved, and how they go on."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_eff.callbacks.exact_resume.buffers import NO_BUFFERS
from lightning_eff.callbacks.exact_resume.kept_loader import KeptLoader, Note
from lightning_eff.callbacks.exact_resume.loader import PlacedLoader
from lightning_eff.callbacks.exact_resume.run_place import BETWEEN_EPOCHS, RunPlace
from lightning_eff.callbacks.exact_resume.seeds import Seeds
from lightning_eff.callbacks.exact_resume.worker import keeps_state
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.random_state import random_state, set_random_state

Iterable = Literal["replay", "refuse"]


class Loaders:
    """Those that Lightning has asked for.

    Args:
        trainer: whose fit it is.
        place: where its loops stand.
        iterable: as ``ExactResume`` has it.
        seeds: as ``PlacedLoader`` has them.
    """

    def __init__(self, trainer: Trainer, place: RunPlace, iterable: Iterable, seeds: Seeds | None) -> None:
        self.trainer: Any = trainer
        self.place = place
        self.iterable = iterable
        self.seeds = seeds
        self._placed: dict[int, PlacedLoader] = {}
        self._kept: dict[int, KeptLoader] = {}
        self._own: deque[tuple[int, dict[int, Any], dict[int, Note]]] = deque(maxlen=4)
        self._anew = False
        """They were made anew for the epoch with which the run goes on, which has begun with them."""

    def detach(self) -> None:
        """Leave the loaders as they were."""
        followers: list[PlacedLoader | KeptLoader] = [*self._placed.values(), *self._kept.values()]
        for follower in followers:
            follower.detach()
        self._placed, self._kept = {}, {}

    # --- when they are there -----------------------------------------------------------------------------------------

    def set(self, saved: dict[str, Any] | None) -> None:
        """They are there, and are iterated next.

        Args:
            saved: of a run that goes on and has not come to its first epoch yet.
        """
        loaders = self.trainer.fit_loop._combined_loader.flattened
        self._own.clear()
        self._anew = False
        if (
            saved is not None
            and self.place.stage == "epoch_start"
            and saved["place"]["stage"] in ("outside", "epoch_end")
        ):
            self._anew = True  # and the ones before are what they were when they are left
            for index, placed in self._placed.items():
                placed.take_up(saved["loaders"].get(index, {}), self._device)
            saved = None
        before, self._placed = self._placed, {}
        kept_before, self._kept = self._kept, {}
        states = {} if saved is None else saved["own"]
        for index, loader in enumerate(loaders):
            if keeps_state(loader):
                if index in states and "ranks" not in (saved or {}):  # Lightning gave it that of rank zero
                    loader.load_state_dict(states[index])
                if isinstance(loader, DataLoader):
                    same = index in kept_before and kept_before[index].loader is loader
                    self._kept[index] = kept_before.pop(index) if same else KeptLoader(loader)
                    over = saved is None or saved["place"]["last"]  # else the next iterator is the next epoch's
                    self._kept[index].target = None if over else saved.get("kept", {}).get(index)  # type: ignore[union-attr]
                continue
            self._check(loader)
            if isinstance(loader, DataLoader):
                same = index in before and before[index].loader is loader  # whose workers may stay
                asked = (self._batch_in_hand, self._is_within_batch, self._is_ahead)
                self._placed[index] = before.pop(index) if same else PlacedLoader(loader, *asked, self.seeds, index)
                self._placed[index].held = saved is not None
        left: list[PlacedLoader | KeptLoader] = [*before.values(), *kept_before.values()]
        for follower in left:
            follower.detach()
        if saved is not None:
            self._fit_places(saved, loaders)

    def _check(self, loader: Any) -> None:
        """Of one that does not keep its own place."""
        data = loader.dataset if isinstance(loader, DataLoader) else loader
        iterable = isinstance(data, IterableDataset) or not isinstance(loader, DataLoader)
        if iterable and not keeps_state(data) and self.iterable == "refuse":
            raise MisconfigurationException(
                f"ExactResume(iterable='refuse'): {type(data).__name__} does not keep its place: give it "
                "`state_dict` and `load_state_dict`, or set iterable='replay', which loads again what was seen"
            )
        if isinstance(loader, DataLoader) and loader.num_workers and not loader.in_order:
            raise MisconfigurationException(
                "ExactResume: a DataLoader with in_order=False gives batches as they happen to be ready: set "
                "in_order=True"
            )

    def _fit_places(self, saved: dict[str, Any], loaders: list[Any]) -> None:
        """The loaders may be cut in other batches, and for other ranks, than those of the run that was broken off."""
        place, ranks, dealt = saved["place"], saved.get("ranks"), set()
        within = place["stage"] not in BETWEEN_EPOCHS and place["batches"] > 0
        for index, loader in self._placed.items():
            then = saved["loaders"].get(index, {})
            saved["loaders"][index], left = loader.fitting(then, saved.get("window", 0), place["last"])
            if loader.about()["replicas"] > 1 and left is None:  # of ranks that share a model's parts only
                dealt.add(index)
            if left is None:
                continue
            if len(loaders) > 1:
                raise MisconfigurationException(
                    "ExactResume: what is left of an epoch is dealt to other ranks, and in other batches, for one "
                    f"training loader, and here are {len(loaders)}: give them as many ranks and samples as before"
                )
            dealt.add(index)
            place.update(batches=len(loader.loader) - left, last=not left)
            saved.update(gradients={}, buffers=NO_BUFFERS, window=0)
            rank_zero_warn(
                f"ExactResume: {then['about']['replicas']} rank(s) with batches of {then['about']['batch_size']} have "
                f"seen {saved['loaders'][index]['pass']['seen']} samples of this epoch. The others are dealt anew, in "
                "the same order, and from here on the run is not equal to the bit"
            )
        if not ranks:
            return
        if lost := [type(loader).__name__ for index, loader in enumerate(loaders) if index not in dealt and within]:
            raise MisconfigurationException(
                f"ExactResume: {ranks} ranks saved this in the midst of an epoch, and what is left of it cannot be "
                f"dealt to others: which of them has seen what is not known of {', '.join(lost)}. Give it as many "
                "ranks as before, or go on without ExactResume, which begins the epoch's order anew"
            )
        if not within:
            rank_zero_warn(f"ExactResume: saved by {ranks} ranks, so from here on the run is not equal to the bit")

    # --- during the run ----------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.trainer.strategy.root_device
        return device

    def _is_within_batch(self) -> bool:
        return self.place.within_batch

    def _is_ahead(self) -> bool:
        """Lightning does not know the length of all loaders together, and looks ahead for the epoch's last batch."""
        fetcher = self.trainer.fit_loop._data_fetcher
        return fetcher is not None and fetcher.length is None

    def _batch_in_hand(self) -> int:
        fetcher = self.trainer.fit_loop._data_fetcher
        return 0 if fetcher is None else int(fetcher.fetched)

    def begin_batch(self) -> None:
        """A batch is about to be asked for."""
        if own := self._own_states():  # Lightning may have fetched one batch more than the run has seen
            notes = {index: loader.note() for index, loader in self._kept.items()}
            self._own.append((self._batch_in_hand(), own, notes))

    def _own_states(self) -> dict[int, Any]:
        """Of the loaders that keep their own place."""
        combined = self.trainer.fit_loop._combined_loader
        loaders = () if combined is None else enumerate(combined.flattened)
        return {index: loader.state_dict() for index, loader in loaders if keeps_state(loader)}

    def state(self, batches: int | None, saved: dict[str, Any] | None) -> dict[str, Any]:
        """Their places.

        Args:
            batches: of the epoch that are behind; None between two epochs.
            saved: of a run that goes on and has not come to its first epoch yet: that is still where they stand.
        """
        if saved is not None:
            return {
                "kept": {},
                **{name: saved[name] for name in ("loaders", "own", "kept", "consumed") if name in saved},
            }
        combined = self.trainer.fit_loop._combined_loader
        iterator = None if combined is None else combined._iterator
        now = (0, self._own_states(), {index: loader.note() for index, loader in self._kept.items()})
        _, own, notes = next((entry for entry in reversed(self._own) if entry[0] == batches), now)
        if batches is None:  # the next epoch's iterator is made from what the generators are then
            notes = {}
        return {
            "loaders": {index: loader.place(batches) for index, loader in self._placed.items()},
            "own": own,
            "kept": {index: self._kept[index].state(note) for index, note in notes.items() if index in self._kept},
            "consumed": list(getattr(iterator, "_consumed", ())),
        }

    # --- going on ----------------------------------------------------------------------------------------------------

    def begin_epoch(self, saved: dict[str, Any], fetcher: _DataFetcher) -> None:
        """They go on: in the midst of an epoch, or with its first batch."""
        if self._anew:  # they have begun by themselves, and in an epoch that is not the first they begin twice
            if self.trainer.current_epoch > 0:
                iter(fetcher)
            return
        combined: Any = self.trainer.fit_loop._combined_loader
        iterators: list[Any] = combined._iterator.iterators
        within = saved["place"]["stage"] not in BETWEEN_EPOCHS
        resumed = False
        for index, loader in enumerate(combined.flattened):
            if index in self._placed:
                iterators[index] = self._placed[index].resume(saved["loaders"].get(index, {}), self._device)
            elif within and not keeps_state(loader):
                iterators[index] = iter(loader)
                for _ in range(saved["place"]["batches"]):
                    next(iterators[index], None)
            else:
                continue
            resumed = True
        if within:
            combined._iterator._idx = saved["place"]["batches"]
        if hasattr(combined._iterator, "_consumed"):
            combined._iterator._consumed = list(saved["consumed"]) if within else [False] * len(iterators)
        if resumed and is_a(fetcher, _PrefetchDataFetcher) and fetcher.length is None:
            befores = (loader.get("before_next") for loader in saved["loaders"].values())
            self._prefetch(fetcher, next((before for before in befores if before), None))

    def _prefetch(self, fetcher: _PrefetchDataFetcher, before: dict[str, Any] | None) -> None:
        """Fetch the batch that Lightning looks ahead for where it does not know the length, as it was fetched then."""
        now = random_state(self._device)
        if before is not None:
            set_random_state(before, torch.device("cpu"))
        fetcher.done, fetcher.batches = False, []
        with suppress(StopIteration):
            fetcher.batches.append(super(type(fetcher), fetcher).__next__())
        if before is not None:
            set_random_state(now, self._device)
