"""ExactResume: a run that was killed is the run that was not."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_eff.arguments import check_choice
from lightning_eff.callbacks.exact_resume.buffers import NO_BUFFERS, own_buffers, set_own_buffers
from lightning_eff.callbacks.exact_resume.generators import Generators
from lightning_eff.callbacks.exact_resume.gradients import UnusedGradients
from lightning_eff.callbacks.exact_resume.loader import PlacedLoader
from lightning_eff.callbacks.exact_resume.logged import logged, set_logged
from lightning_eff.callbacks.exact_resume.run_place import BETWEEN_EPOCHS, RunPlace
from lightning_eff.callbacks.exact_resume.seeds import Seeds
from lightning_eff.callbacks.exact_resume.worker import keeps_state
from lightning_eff.training.hooks import Order
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.random_state import random_state, seed_host, set_random_state
from lightning_eff.training.rank_state import KEY as RANK_STATE
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import callbacks_of, sort_callbacks

Iterable = Literal["replay", "refuse"]
Randomness = Literal["stock", "seeded"]


class ExactResume(Callback):
    """Makes every checkpoint that Lightning writes one from which the run goes on as if it had not been broken off.

    To the bit: weights, optimizers, values logged, the order of samples and the augmentations inside workers. With the
    checkpoint are saved, for each rank, the random generators, the place in each training loader with what its order
    was drawn from, the random states of its workers, the gradients of a window of accumulation that is not full, a
    rank's own buffers, and the epoch's means; and where in Lightning's loops it was saved, so that a validation or an
    epoch's end that was still to come still comes. Batches that were seen are skipped at the sampler and not loaded.

    A checkpoint that is saved within a batch (because of an exception, say) belongs to the end of the batch before.

    Runs in: behind ``on_train_batch_end``, around Lightning's loops, and when a checkpoint is saved or loaded.
    Reads: random generators, samplers, gradients, what was logged.
    Changes: nothing, until a run resumes.
    Collectives: none of its own; saving and loading as ``RankState`` does.
    Host syncs: none, but when a checkpoint is saved.
    Strategies: one device, DDP, FSDP2, those of the suite.

    Args:
        iterable: what is done with an ``IterableDataset``, or data that are no DataLoader, without a ``state_dict`` of
            their own. ``"replay"``: what was seen of the epoch is loaded once more and dropped. ``"refuse"``: an error
            when the fit begins.
        randomness: where random numbers come from. ``"stock"``: from where they come without this callback, so the run
            is plain Lightning's to the bit; the states of a loader's workers travel with each batch. ``"seeded"``:
            each order, each batch that is loaded and each training step draws from the seed that torch had when the fit
            began, the epoch and the number of the batch, and what a batch draws while it is loaded is the same with
            any number of workers.

    With another number of ranks or another batch size the rest of an epoch is dealt anew in the same order, so that
    each of its samples is still seen once, and a warning says that the run is not equal to the bit from there on.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for two of these callbacks; when the fit begins, for data that cannot
            be resumed exactly; on resume, for other data than those of the run that was broken off.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import ExactResume
        >>> trainer = L.Trainer(max_steps=1, callbacks=[ExactResume()], logger=False)

    Source: ours.
    """

    order = Order.FIRST

    def __init__(self, iterable: Iterable = "replay", randomness: Randomness = "stock") -> None:
        check_choice("iterable", iterable, Iterable)
        check_choice("randomness", randomness, Randomness)
        self.iterable: Iterable = iterable
        self.randomness: Randomness = randomness
        self._place = RunPlace()
        self._gradients = UnusedGradients()
        self._state = RankState("exact_resume", save=self._save, load=self._load, recover=self._recover)
        self._trainer: Any = None
        self._loaders: dict[int, PlacedLoader] = {}
        self._own: deque[tuple[int, dict[int, Any]]] = deque(maxlen=4)
        self._saved: dict[str, Any] | None = None
        self._seeds: Seeds | None = None

    # --- attaching ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(callback, ExactResume) for callback in callbacks_of(trainer)) > 1:
            raise MisconfigurationException("two ExactResume callbacks would both place the loaders: keep one")
        sort_callbacks(trainer)
        self._detach()
        self._trainer = trainer
        self._seeds = None
        if self.randomness == "seeded":
            self._seeds = Seeds(torch.initial_seed(), trainer.global_rank, lambda: int(trainer.current_epoch))
        self._load(None)
        self._state.attach(trainer.strategy)
        self._place.attach(
            trainer,
            set_loaders=lambda: self._set_loaders(trainer),
            begin=lambda: self._begin(trainer),
            begin_batch=lambda: self._begin_batch(trainer),
            begin_epoch=lambda fetcher: self._begin_epoch(trainer, fetcher),
        )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "exact_resume" not in checkpoint.get(RANK_STATE, {}).get("names", ()):
            rank_zero_warn(
                "ExactResume: this checkpoint was saved without it, so the run goes on as Lightning does: with other "
                "random numbers, and in another order"
            )

    def _set_loaders(self, trainer: Trainer) -> None:
        """The training loaders are there, and are iterated next."""
        for loader in self._loaders.values():
            loader.detach()
        self._loaders = {}
        loop = trainer.fit_loop
        assert loop._combined_loader is not None
        states = {} if self._saved is None else self._saved["own"]
        for index, loader in enumerate(loop._combined_loader.flattened):
            if keeps_state(loader):
                if index in states and "ranks" not in (self._saved or {}):  # Lightning gave it that of rank zero
                    loader.load_state_dict(states[index])
            else:
                self._check(loader)
            if isinstance(loader, DataLoader) and not keeps_state(loader):
                asked = (self._batch_in_hand, self._is_within_batch)
                self._loaders[index] = PlacedLoader(loader, *asked, self._seeds, index)
                self._loaders[index].held = self._saved is not None
        self._own.clear()
        if self._saved is not None:
            self._fit_places(self._saved, loop._combined_loader.flattened)

    def _fit_places(self, saved: dict[str, Any], loaders: list[Any]) -> None:
        """The loaders may be cut in other batches, and for other ranks, than those of the run that was broken off."""
        place, ranks, dealt = saved["place"], saved.get("ranks"), set()
        within = place["stage"] not in BETWEEN_EPOCHS and place["batches"] > 0
        for index, loader in self._loaders.items():
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

    def _is_within_batch(self) -> bool:
        return self._place.within_batch

    def _batch_in_hand(self) -> int:
        fetcher = self._trainer.fit_loop._data_fetcher
        return 0 if fetcher is None else int(fetcher.fetched)

    # --- during the run ----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gradients.attach(trainer)

    def _begin_batch(self, trainer: Trainer) -> None:
        """A batch is about to be asked for."""
        self._gradients.begin_batch()
        if self._seeds is not None:
            seed = self._seeds.of_batch(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            seed_host(seed)
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.manual_seed(seed)  # of the current device, which is this one
        if own := self._own_states(trainer):  # Lightning may have fetched one batch more than the run has seen
            self._own.append((self._batch_in_hand(), own))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._place.end_batch()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._place.end_validation()

    @staticmethod
    def _own_states(trainer: Trainer) -> dict[int, Any]:
        """Of the loaders that keep their own place."""
        combined = trainer.fit_loop._combined_loader
        loaders = () if combined is None else enumerate(combined.flattened)
        return {index: loader.state_dict() for index, loader in loaders if keeps_state(loader)}

    @staticmethod
    def _user_generators(trainer: Trainer) -> Generators:
        return Generators(module=trainer.lightning_module, datamodule=getattr(trainer, "datamodule", None))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> dict[str, Any]:
        trainer = self._trainer
        batches = self._place.batches(trainer)
        combined = trainer.fit_loop._combined_loader
        iterator = None if combined is None else combined._iterator
        own = [states for fetched, states in self._own if fetched == batches]
        gradients = self._gradients.state(trainer, batches)
        automatic = trainer.lightning_module.automatic_optimization
        return {
            "version": 1,
            "seed": None if self._seeds is None else self._seeds.base,
            "window": batches % trainer.accumulate_grad_batches if gradients and batches and automatic else 0,
            "place": self._place.state(trainer),
            "loaders": {index: loader.place(batches) for index, loader in self._loaders.items()},
            "own": own[-1] if own else self._own_states(trainer),
            "consumed": list(getattr(iterator, "_consumed", ())),
            "generators": self._user_generators(trainer).state(),
            "gradients": gradients,
            "buffers": own_buffers(trainer),
            "logged": logged(trainer),
        }

    def _load(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            check_version("ExactResume", saved, known=1)
            seed = saved.get("seed")
            if (seed is None) == (self.randomness == "seeded"):
                rank_zero_warn(
                    f"ExactResume(randomness={self.randomness!r}): this checkpoint was saved with the other one, so "
                    "from here on the run is not equal to the bit"
                )
            elif self._seeds is not None and seed is not None:
                self._seeds.base = seed
        self._saved = saved
        self._place.load(None if saved is None else saved["place"])

    def _recover(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any] | None:
        """With another number of ranks: what one of those that there were has saved."""
        ranks = checkpoint[RANK_STATE]["world_size"]
        if ranks == self._trainer.world_size:
            return None
        state = self._state.of_rank(path, checkpoint, self._trainer.global_rank % ranks)
        if state is None:
            return None
        logged = {"results": {}, "metrics": {}, "made": {}, "shown": state["logged"]["shown"]}  # sums over other ranks
        return {**state, "ranks": ranks, "gradients": {}, "buffers": NO_BUFFERS, "logged": logged}

    def _begin(self, trainer: Trainer) -> None:
        """Everything is set up, ``on_train_start`` is behind: from here on the run is the one that was broken off."""
        saved = self._saved
        if saved is None:
            return
        Generators(module=trainer.lightning_module, datamodule=getattr(trainer, "datamodule", None)).set(
            saved["generators"]
        )
        self._gradients.set(trainer, saved["gradients"])
        set_own_buffers(trainer, saved["buffers"])
        set_logged(trainer, saved["logged"])
        set_random_state(saved["place"]["random"], trainer.strategy.root_device)

    def _begin_epoch(self, trainer: Trainer, fetcher: _DataFetcher) -> None:
        """The loaders go on: in the midst of an epoch, or with its first batch."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        combined: Any = trainer.fit_loop._combined_loader
        iterators: list[Any] = combined._iterator.iterators
        device = trainer.strategy.root_device
        within = saved["place"]["stage"] not in BETWEEN_EPOCHS
        resumed = False
        for index, loader in enumerate(combined.flattened):
            if index in self._loaders:
                iterators[index] = self._loaders[index].resume(saved["loaders"].get(index, {}), device)
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
            self._prefetch(fetcher, next((before for before in befores if before), None), device)

    @staticmethod
    def _prefetch(fetcher: _PrefetchDataFetcher, before: dict[str, Any] | None, device: torch.device) -> None:
        """Fetch the batch that Lightning looks ahead for where it does not know the length, as it was fetched then."""
        now = random_state(device)
        if before is not None:
            set_random_state(before, torch.device("cpu"))
        fetcher.done, fetcher.batches = False, []
        with suppress(StopIteration):
            fetcher.batches.append(super(type(fetcher), fetcher).__next__())
        if before is not None:
            set_random_state(now, device)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._gradients.stop()  # and what is known of them stays, for a checkpoint that is saved now

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        self._place.detach()
        self._gradients.detach()
        for loader in self._loaders.values():
            loader.detach()
        self._loaders = {}
